"""Tables of the pages, made from the code when the site is built, so that they cannot go stale.

A line ``<!-- table: NAME -->`` of a page becomes the table `TABLES[NAME]`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from typing import Any

from npad.learned import MEANINGS, MEMBER_MEANINGS, Learned, LearnedMember, tensors_of
from npad.nominal_methods import METHODS
from npad.settings import ARGUMENTS, Settings

_MARK = re.compile(r"^<!-- table: (.+) -->$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the tables into a page; MkDocs calls it."""
    return _MARK.sub(lambda mark: TABLES[mark[1]](), markdown)


def _arguments() -> str:
    return _table(
        ("argument", "on the command line", "default", "what it is"),
        (
            (
                f"`{a.name}`",
                " or ".join(f"`{v}`" for v in a.values.split("|")) if a.parse else "no option",
                f"`{a.default!r}`" if a.unset is None else f"`{a.default}`: {a.unset}",
                a.help,
            )
            for a in ARGUMENTS
        ),
    )


def _kept() -> str:
    defaults = Settings().to_json()
    return _table(
        ("key of `settings`", "with the default settings"),
        ((f"`{name}`", f"`{json.dumps(value)}`") for name, value in defaults.items()),
    )


def _tensors() -> str:
    kept = {a.name for a in ARGUMENTS}
    return _table(
        ("tensor", "shape", "dtype", "what it is"),
        (
            (
                f"`{t.name}`",
                f"({', '.join(t.shape)})",
                f"as `{t.dtype}` says" if t.dtype in kept else t.dtype,
                t.meaning,
            )
            for t in (*tensors_of(Learned), *tensors_of(LearnedMember))
        ),
    )


def _values() -> str:
    tensors = {t.name for t in tensors_of(Learned)}
    return _table(
        ("key of the header", "what it is"),
        ((f"`{name}`", text) for name, text in MEANINGS.items() if name not in tensors),
    )


def _members() -> str:
    tensors = {t.name for t in tensors_of(LearnedMember)}
    return _table(
        ("key of a member", "what it is"),
        ((f"`{name}`", text) for name, text in MEMBER_MEANINGS.items() if name not in tensors),
    )


def _nominal_sets() -> str:
    return _table(
        ("method", "what it is", "needs"),
        (
            (f"`{name!r}`", m.summary, f"`npad[{m.extra}]`" if m.extra else "nothing more")
            for name, m in METHODS.items()
        ),
    )


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    return "\n".join(_row(cells) for cells in (head, ["---"] * len(head), *rows))


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


TABLES: dict[str, Callable[[], str]] = {
    "arguments": _arguments,
    "kept": _kept,
    "values": _values,
    "members": _members,
    "tensors": _tensors,
    "nominal sets": _nominal_sets,
}
