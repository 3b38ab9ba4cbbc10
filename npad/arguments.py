"""Checks of NPad's arguments; each message names the argument and what it may be."""

from __future__ import annotations

from typing import Any, Final

from npad import ops

__all__ = ["DTYPES", "at_most", "choice", "eps", "height_width", "odd"]

# By the names that arguments and model files give them.
DTYPES: Final = {str(dtype).removeprefix("torch."): dtype for dtype in ops.FACTOR_DTYPES}


def height_width(size: Any) -> tuple[int, int]:
    """Check ``image_size``."""
    match size:
        case int(height):
            width = height
        case [int(height), int(width)]:
            pass
        case _:
            height = width = 0
    if min(height, width) < 1:
        raise ValueError(
            f"NPad: image_size must be a positive int or (height, width), got {size!r}"
        )
    return height, width


def odd(name: str, value: int) -> int:
    """Check the side of a window that has a centre."""
    if not isinstance(value, int) or value < 1 or value % 2 == 0:
        raise ValueError(f"NPad: {name} must be an odd int of at least 1, got {value!r}")
    return value


def eps(value: float | str) -> float | str:
    """Check ``eps``."""
    if value == "auto" or (not isinstance(value, str) and 0 <= value < float("inf")):
        return value
    raise ValueError(f"NPad: eps must be 'auto' or a number of at least 0, got {value!r}")


def at_most(name: str, value: float, most: float) -> float:
    """Check a number that must lie between 0 and `most`."""
    if not isinstance(value, (int, float)) or not 0 <= value <= most:
        raise ValueError(f"NPad: {name} must be a number from 0 to {most}, got {value!r}")
    return value


def choice(name: str, value: Any, choices: tuple[Any, ...]) -> Any:
    """Check that a value is one of a few."""
    if value not in choices:
        raise ValueError(
            f"NPad: {name} must be one of {', '.join(map(repr, choices))}, got {value!r}"
        )
    return value
