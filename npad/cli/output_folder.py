"""One run at a time writes into a folder."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from npad.cli.program import UsageError
from npad.file_names import shown

__all__ = ["alone_in"]

LOCK = ".npad-lock"


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder, which is made if it is not there.

    What counts is the lock that a living process holds on the file, not the file: one that was left
    behind is in nobody's way. Where the file system has no locks, nobody is kept out.

    Raises
    ------
    UsageError
        Another run is writing into the folder.
    OSError
        The folder cannot be made or written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = _locked(folder)
    try:
        yield
    finally:
        with suppress(OSError):
            (folder / LOCK).unlink()
        os.close(descriptor)


def _locked(folder: Path) -> int:
    """Descriptor of the file, with the lock; not of one that its last owner has just removed."""
    while True:
        descriptor = _open(folder)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise UsageError(
                f"{shown(folder)}: another run is writing there: wait until it ends, or give "
                "another folder with --output"
            ) from error
        except OSError:  # there are no locks
            return descriptor
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), (folder / LOCK).stat()):
                return descriptor
        os.close(descriptor)


def _open(folder: Path) -> int:
    try:
        return os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        with suppress(OSError):  # another user's, left behind
            return os.open(folder / LOCK, os.O_RDONLY | os.O_CLOEXEC)
        raise OSError(error.errno, error.strerror, str(folder)) from error
