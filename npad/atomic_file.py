"""Files that appear whole or not at all, whatever happens while they are written."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from io import BufferedWriter
from pathlib import Path

__all__ = ["naming", "remove_leftovers", "replacing"]

_TEMPORARY = ".npad-{}.tmp"  # hidden, and ends as no result does


@contextmanager
def replacing(
    path: str | os.PathLike[str], *, one_of_many: bool = False
) -> Iterator[BufferedWriter]:
    """Write to a temporary file that takes the place of `path` once it is whole and on the disk.

    The temporary file lies in the same folder, under a name that no other writer uses. It is flushed
    to the disk before it is renamed, and removed after an exception, so that a full disk, an
    interrupt or a power cut leaves what was there before. One that a killed process left behind is
    removed by the next writer in the folder.

    Parameters
    ----------
    path : path
        Where it is a symbolic link, the file it points to is replaced and the link stays. A new
        file's mode follows the umask; a file that is replaced passes its mode on, so far as the
        umask allows.
    one_of_many : bool
        For thousands of files that can be made again: the disk is not waited for, so that a power
        cut may take the file, and the folder is not searched for what was left behind.

    Yields
    ------
    file : BufferedWriter
        Can be written and sought.

    Raises
    ------
    OSError
        As `open` does: no such folder, no permission to write the folder or the file that is there,
        a full disk. Also where `path` is a folder or a device, which renaming would replace. It
        names `path`, unless it is about another file that was used in the block.
    """
    with naming(path), _replacing(path, one_of_many) as file:
        yield file


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Let an OSError that names a temporary file, or none, name the file that was asked for."""
    try:
        yield
    except OSError as error:
        if error.errno is None or not _is_no_help(error.filename):
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def _is_no_help(name: object) -> bool:
    if not isinstance(name, str | bytes | os.PathLike):
        return True  # none, or the number of a descriptor
    return fnmatch(Path(os.fsdecode(name)).name, _TEMPORARY.format("*"))


@contextmanager
def _replacing(path: str | os.PathLike[str], one_of_many: bool) -> Iterator[BufferedWriter]:
    target = Path(os.path.realpath(path))
    mode = _mode(target)
    if not one_of_many:
        remove_leftovers(target.parent)
    temporary = target.parent / _TEMPORARY.format(secrets.token_hex(8))
    try:  # an interrupt may come as soon as the file is there
        with os.fdopen(_open_temporary(temporary, mode), "wb") as file:
            yield file
            file.flush()
            if not one_of_many:
                os.fsync(file.fileno())
            temporary.replace(target)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    if one_of_many:
        return
    with suppress(OSError):  # the file is in place; not every file system can flush a folder
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _mode(target: Path) -> int:
    """Mode of the new file. Renaming does not ask if the old one is a file, or read-only."""
    if not target.exists():
        return 0o666
    if not target.is_file():
        raise OSError(errno.EEXIST, "this is not a file and is not replaced", str(target))
    with target.open("r+b") as file:
        return stat.S_IMODE(os.fstat(file.fileno()).st_mode)


def _open_temporary(path: Path, mode: int) -> int:
    """Descriptor of a new file, locked to tell other writers that it is no leftover."""
    while True:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, mode)
        with suppress(OSError):  # some file systems have no locks; there, leftovers stay
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if path.exists():
            return descriptor
        os.close(descriptor)  # another writer removed it before it was locked


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files whose writer was killed; a living writer holds the lock of its own."""
    for leftover in folder.glob(_TEMPORARY.format("*")):
        with suppress(OSError), leftover.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), leftover.stat()):  # not a new file's name
                leftover.unlink()
