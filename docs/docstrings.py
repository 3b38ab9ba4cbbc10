"""How mkdocstrings reads this project's docstrings.

Numpydoc has ``name : type`` with the description indented below. Here a line may also say it all, with
the shape first: ``mean : (P, C) float32, P = H * W``. What stands where a type belongs is moved to the
description, and the type is taken from the signature.

griffe reads the source. It is also given what an import makes of that: the docstring of NPad, and the
defaults of Settings and Learned.
"""

from __future__ import annotations

import inspect
from typing import Any

import griffe

from npad import NPad
from npad.learned import Learned
from npad.settings import Settings


class OneLine(griffe.Extension):
    """Reads ``name : what it is`` as a description."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Mend the sections of a docstring, which griffe parses once."""
        if obj.path in _IMPORTED and isinstance(obj, griffe.Class):
            _complete(obj, _IMPORTED[obj.path])
        for section in obj.docstring.parsed if obj.docstring is not None else ():
            if section.kind in _RESULTS:
                section.value = _joined(section.value)
            if section.kind in _ENTRIES | _RESULTS:
                for entry in section.value:
                    if entry.annotation is not None and not _is_type(entry.annotation):
                        _move(entry, obj)


_IMPORTED = {f"{kind.__module__}.{kind.__name__}": kind for kind in (NPad, Settings, Learned)}


def _complete(obj: griffe.Class, kind: type) -> None:
    if obj.docstring is not None:
        obj.docstring.value = inspect.getdoc(kind) or ""
    for name, known in inspect.signature(kind).parameters.items():
        if name in obj.parameters:
            default = None if known.default is known.empty else repr(known.default)
            obj.parameters[name].default = default


_Kind = griffe.DocstringSectionKind
_ENTRIES = {_Kind.parameters, _Kind.other_parameters, _Kind.attributes}
_RESULTS = {_Kind.returns, _Kind.yields}


def _joined(results: list[Any]) -> list[Any]:
    """One result where griffe sees one in each line of its prose."""
    if any(entry.name or _is_type(entry.annotation) for entry in results):
        return results
    first, *others = results
    text = [first.description, *(f"{entry.annotation} {entry.description}" for entry in others)]
    first.description = " ".join(part.strip() for part in text if part)
    return [first]


def _is_type(annotation: str | griffe.Expr | None) -> bool:
    """Prose is no Python, and a shape is a tuple."""
    return isinstance(annotation, griffe.Expr) and not isinstance(annotation, griffe.ExprTuple)


def _move(entry: Any, obj: griffe.Object) -> None:
    parts = str(entry.annotation), entry.description
    entry.description = " ".join(part for part in parts if part)
    entry.annotation = None
    if isinstance(entry, griffe.DocstringReturn | griffe.DocstringYield):
        if not entry.name:
            entry.annotation = getattr(obj, "returns", None)
    elif isinstance(obj, griffe.Function | griffe.Class) and entry.name in obj.parameters:
        entry.annotation = obj.parameters[entry.name].annotation
    elif isinstance(member := obj.members.get(entry.name), griffe.Attribute):
        entry.annotation = member.annotation
