"""Progress bars on standard error for work that takes more than two seconds, drawn by tqdm.

Nothing is printed, and tqdm is not imported, where standard error is neither a terminal nor a
notebook's. Bars are erased when their work ends, however it ends.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

from npad.file_names import shown

__all__ = ["Advance", "task", "track"]

T = TypeVar("T")

DELAY = 2.0  # seconds of work before a bar appears


class Advance(Protocol):
    """Report that `n` more units of the work are done."""

    def __call__(self, n: float = 1) -> None:
        """Add `n` to the count."""


@contextmanager
def task(
    description: str, total: float | None = None, enabled: bool | None = None, unit: str = "it"
) -> Iterator[Advance]:
    """Progress bar for a loop that reports its own counts: `with task(...) as advance: advance(n)`.

    Parameters
    ----------
    description : str
        What is being done, shown before the bar.
    total : float, optional
        How much there is to do, in the units that `advance` is given. Without it the bar shows the
        count and the rate but no time left.
    enabled : bool, optional
        False never shows a bar; None and True show one, where somebody can see it, after two seconds.
    unit : str
        What is counted, such as "images"; bytes ("B") are shown as kB, MB and so on.

    Yields
    ------
    advance : callable
        `advance(n=1)` adds n units.
    """
    if enabled is False or not _is_seen():
        yield _advance_nothing
        return
    from tqdm.auto import tqdm  # noqa: PLC0415  (imported only where a bar may be shown)

    with tqdm(
        desc=shown(description),
        total=total,
        unit="B" if unit == "B" else f" {unit}",
        unit_scale=unit == "B",
        delay=DELAY,
        leave=False,
        dynamic_ncols=True,
        file=sys.stderr,
    ) as bar:
        yield bar.update
        bar.total = bar.n  # a notebook would show as failed what ends short, as after a bad image


def track(
    iterable: Iterable[T],
    description: str,
    total: float | None = None,
    enabled: bool | None = None,
    unit: str = "it",
) -> Iterator[T]:
    """Yield the items of `iterable` under the progress bar of a `task`, one unit each."""
    with task(description, total, enabled, unit) as advance:
        for item in iterable:
            yield item
            advance()


def _is_seen() -> bool:
    """Whether standard error is a terminal, or that of a notebook's kernel."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return hasattr(shell, "kernel") or (sys.stderr is not None and sys.stderr.isatty())


def _advance_nothing(n: float = 1) -> None:
    """Advance a bar that is never shown."""
