"""Progress bars on standard error for work that takes more than two seconds.

Nothing is printed, and rich is not imported, until the two seconds have passed, and never where
standard error is not a terminal. Bars are erased when their work ends, however it ends.
"""

from __future__ import annotations

import atexit
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

__all__ = ["Advance", "task", "track"]

T = TypeVar("T")

DELAY = 2.0  # seconds of work before a bar appears


class Advance(Protocol):
    """Report that `n` more units of the work are done."""

    def __call__(self, n: float = 1) -> None:
        """Add `n` to the count."""


def track(
    iterable: Iterable[T],
    description: str,
    total: float | None = None,
    enabled: bool | None = None,
    unit: str = "",
) -> Iterator[T]:
    """Yield the items of `iterable` under a progress bar.

    Parameters
    ----------
    iterable : iterable
    description : str
        What is being done, shown before the bar.
    total : float, optional
        How many items there are; `len(iterable)` where that is known. Without it the bar shows the
        count and the rate but no time left.
    enabled : bool, optional
        False never shows a bar; None and True show one on a terminal after two seconds.
    unit : str
        What is counted, such as "images".

    Yields
    ------
    The items, unchanged.
    """
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    with task(description, total, enabled, unit) as advance:
        for item in iterable:
            yield item
            advance()


@contextmanager
def task(
    description: str, total: float | None = None, enabled: bool | None = None, unit: str = ""
) -> Iterator[Advance]:
    """Progress bar for a loop that reports its own counts: `with task(...) as advance: advance(n)`.

    Parameters
    ----------
    description, total, enabled, unit
        As in `track`. `total` is in the units that `advance` is given.

    Yields
    ------
    advance : callable
        `advance(n=1)` adds n units. The bar appears at the first call after two seconds.
    """
    if enabled is False or sys.stderr is None or not sys.stderr.isatty():
        yield _advance_nothing
        return
    row = _Row(description, total, unit)
    try:
        yield row.advance
    finally:
        row.close()


def _advance_nothing(n: float = 1) -> None:
    """Advance a bar that is never shown."""


def _pace(done: float, total: float | None, seconds: float, unit: str) -> str:
    """Count, rate and time left, from the average over the whole run."""
    rate = done / seconds if seconds > 0 else 0.0
    count = f"{done:,.0f}" if total is None else f"{done:,.0f}/{total:,.0f}"
    text = f"{count} {unit}".rstrip() + f", {rate:.3g}/s"
    if total is None or rate == 0:
        return text
    left = timedelta(seconds=round(max(total - done, 0) / rate))
    return f"{text}, {left} left"


class _Row:
    """One task: counts silently, and takes a row of the display once it has run for `DELAY`."""

    def __init__(self, description: str, total: float | None, unit: str) -> None:
        self._description = description
        self._total = total
        self._unit = unit
        self._done = 0.0
        self._start = time.monotonic()
        self._id: TaskID | None = None

    def advance(self, n: float = 1) -> None:
        self._done += n
        seconds = time.monotonic() - self._start
        if seconds < DELAY:
            return
        if self._id is None:
            self._id = _display.add(self._description, self._total)
        _display.update(self._id, self._done, _pace(self._done, self._total, seconds, self._unit))

    def close(self) -> None:
        if self._id is not None:
            _display.remove(self._id)


class _Display:
    """The one live display, shared by all rows: a terminal can hold one, and tasks nest."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._bars: Progress | None = None

    def add(self, description: str, total: float | None) -> TaskID:
        from rich.console import Console  # noqa: PLC0415  (imported only when a bar is shown)
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn  # noqa: PLC0415

        with self._lock:
            if self._bars is None:
                self._bars = Progress(
                    SpinnerColumn(),
                    TextColumn("{task.description}", markup=False),
                    BarColumn(),
                    TextColumn("{task.fields[pace]}", markup=False),
                    console=Console(file=sys.stderr),
                    transient=True,
                    redirect_stdout=False,  # standard output may be data on its way to a file
                )
                self._bars.start()
                atexit.register(self.stop)  # a bar left open must not leave the cursor hidden
            return self._bars.add_task(description, total=total, pace="")

    def update(self, row: TaskID, done: float, pace: str) -> None:
        with self._lock:
            if self._bars is not None:
                self._bars.update(row, completed=done, pace=pace)

    def remove(self, row: TaskID) -> None:
        with self._lock:
            if self._bars is not None:
                self._bars.remove_task(row)
                if not self._bars.tasks:
                    self.stop()

    def stop(self) -> None:
        """Erase the bars and show the cursor again."""
        with self._lock:
            if self._bars is not None:
                self._bars.stop()
                self._bars = None
                atexit.unregister(self.stop)


_display = _Display()
