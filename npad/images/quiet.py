"""Pillow without its remarks: what it says of damaged files is harmless, or raised as an error too."""

from __future__ import annotations

import ctypes
import logging
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from PIL import _imaging

__all__ = ["quiet_pillow"]


class _ThisThread(threading.local):
    """In the place of a filter's pattern: what it matches differs from thread to thread."""

    match: Any = re.compile(r"(?!)").match  # nothing, but while the thread is quiet


_PILLOW = re.compile(r"PIL\.")
_this_thread = _ThisThread()
_FILTER: Any = ("ignore", None, Warning, _this_thread, 0)
_logger = logging.getLogger("PIL.TiffImagePlugin")  # the only one of Pillow's that reports errors

_lock = threading.Lock()
_n_quiet = 0  # threads
_changed: list[Any] = []  # lists of filters that hold ours
_libtiff_handler: int | None = None  # that was there


@contextmanager
def quiet_pillow() -> Iterator[None]:
    """Keep Pillow's warnings and errors, and libtiff's, from the user's terminal in this thread.

    `warnings.catch_warnings` swaps the filters of the whole process: leaving it in one thread undoes
    or keeps what another has set. Here one filter, one log filter and one handler are put in place
    by the first thread and taken away by the last. The filters are deaf to other threads; libtiff,
    which knows no threads, is silent in all of them meanwhile.
    """
    with _lock:
        _put_in_place()
    before = _this_thread.match
    try:
        _this_thread.match = _PILLOW.match
        yield
    finally:
        _this_thread.match = before
        with _lock:
            _take_away()


def _put_in_place() -> None:
    global _n_quiet, _libtiff_handler  # noqa: PLW0603
    _n_quiet += 1
    # Another list than before, where catch_warnings has begun or ended.
    filters: Any = warnings.filters
    if not filters or filters[0] is not _FILTER:
        filters.insert(0, _FILTER)
        _changed.append(filters)
    if _n_quiet == 1:
        _logger.addFilter(_passes)
        _libtiff_handler = _set_libtiff_handler(None)


def _take_away() -> None:
    global _n_quiet  # noqa: PLW0603
    _n_quiet -= 1
    if _n_quiet == 0:
        for filters in (*_changed, warnings.filters):
            while _FILTER in filters:
                filters.remove(_FILTER)
        _changed.clear()
        _logger.removeFilter(_passes)
        _set_libtiff_handler(_libtiff_handler)


def _passes(record: logging.LogRecord) -> bool:
    return record.levelno < logging.WARNING or not _this_thread.match(record.name)


def _set_libtiff_handler(handler: int | None) -> int | None:
    """Set what libtiff calls with an error and return what it called before; None is nothing."""
    setter = _libtiff_setter()
    return None if setter is None else setter(handler)


@cache
def _libtiff_setter() -> Any:
    """The function of libtiff, or None where its symbols cannot be reached: it prints there."""
    try:
        setter = ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler
    except (AttributeError, OSError):
        return None
    setter.argtypes, setter.restype = [ctypes.c_void_p], ctypes.c_void_p
    return setter
