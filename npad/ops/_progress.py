"""How an op that takes long tells how far it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Report = Callable[[int, int], None]  # called as report(done, total)

current: ContextVar[Report | None] = ContextVar("current", default=None)


@contextmanager
def report_progress(callback: Report | None) -> Iterator[None]:
    """Inside the block, ``farthest_first`` calls ``callback(done, total)`` now and then."""
    token = current.set(callback)
    try:
        yield
    finally:
        current.reset(token)
