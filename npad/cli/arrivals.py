"""Images that appear in folders: which are new, and which are whole.

Folders are asked again and again: file servers tell nobody what happens in them.
"""

from __future__ import annotations

import os
import time
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from npad.cli.program import tell
from npad.file_names import shown
from npad.images.errors import ImageError
from npad.images.folders import search, warn_of_left_out

__all__ = ["Arrivals", "Image"]


@dataclass(frozen=True)
class Image:
    """A file at one state of its content: one that is written anew under its name is another image.

    Attributes
    ----------
    path : absolute
    n_bytes : of the file
    modified : nanoseconds, when it was last written
    """

    path: str
    n_bytes: int
    modified: int

    @classmethod
    def found(cls, path: str | os.PathLike[str]) -> Image | None:
        """The image that lies there now, if one does."""
        try:
            status = os.stat(path)  # noqa: PTH116
        except OSError:  # moved away meanwhile; or a link to nothing
            return None
        return cls(os.fspath(path), status.st_size, status.st_mtime_ns)

    @property
    def id(self) -> int:
        """64 bits that stand for it."""
        text = os.fsencode(self.path) + f"/{self.n_bytes}/{self.modified}".encode()
        return int.from_bytes(blake2b(text, digest_size=8).digest(), "little")


class _Seen:
    """Ids of images, 8 bytes each."""

    def __init__(self, images: Iterable[Image]) -> None:
        self._ids = array("Q", sorted({image.id for image in images}))

    def __contains__(self, image: Image) -> bool:
        i = bisect_left(self._ids, image.id)
        return i < len(self._ids) and self._ids[i] == image.id

    def add(self, image: Image) -> None:
        self._ids.insert(bisect_left(self._ids, image.id), image.id)


class Arrivals:
    """What is new in some folders.

    An image is handed out once its size and its time of change are what they were when the folders
    were last looked at. Then it is `done` or, where it cannot be read, `failed`: a slow camera may be
    at it still, so that it comes again until it has lain unchanged for a while.

    Parameters
    ----------
    folders : absolute; searched with their subfolders, as `npad.images.folders` has it
    scored : images that are not new
    patience : seconds for which an unchanged image that cannot be read comes again

    Attributes
    ----------
    present : paths of all images that were there at the last look
    """

    def __init__(self, folders: Sequence[Path], scored: Iterable[Image], patience: float) -> None:
        self.present: list[str] = []
        self._folders = folders
        self._patience = patience
        self._seen = _Seen(scored)
        self._waiting: dict[str, tuple[Image, float]] = {}  # by path; since when it is as it is
        self._given_up: dict[str, Image] = {}
        self._left_out: set[tuple[Path, str]] = set()  # kinds of files that were told
        self._lost: set[Path] = set()  # folders that cannot be read now

    @property
    def are_expected(self) -> bool:
        """Whether an image is there that is neither done nor given up."""
        return bool(self._waiting)

    def look(self) -> list[Image]:
        """The images that are whole and not done, in the order in which they were written.

        A folder that cannot be read, such as a share that is away, is told once and asked again.

        Warns
        -----
        UserWarning
            A kind of files that was not there before is left out, and may be images.
        """
        now = time.monotonic()
        whole = []
        waiting, given_up = {}, {}
        present = self._present()
        self.present = [image.path for image in present]
        for image in present:
            path = image.path
            if image in self._seen:
                continue
            if self._given_up.get(path) == image:
                given_up[path] = image
                continue
            known, since = self._waiting.get(path, (None, now))
            if known == image:
                whole.append(image)
            else:
                since = now
            waiting[path] = image, since
        self._waiting, self._given_up = waiting, given_up
        return sorted(whole, key=lambda image: (image.modified, image.path))

    def _present(self) -> dict[Image, None]:
        """Images that are there; of a folder that cannot be read, those that were waited for."""
        present: dict[Image, None] = {}
        for folder in self._folders:
            try:
                found = search(folder)
            except ImageError as error:
                if folder not in self._lost:
                    tell("warning", f"{shown(error.path)}: {error.reason}; it is asked again")
                self._lost.add(folder)
                kept = [*(image for image, _ in self._waiting.values()), *self._given_up.values()]
                present |= dict.fromkeys(i for i in kept if folder in Path(i.path).parents)
                continue
            self._lost.discard(folder)
            new = {kind for kind in found.left_out if (folder, kind) not in self._left_out}
            warn_of_left_out(folder, {kind: found.left_out[kind] for kind in new})
            self._left_out |= {(folder, kind) for kind in new}
            images = (Image.found(path) for path in found.images)
            present |= dict.fromkeys(image for image in images if image is not None)
        return present

    def done(self, image: Image) -> None:
        """It does not come again."""
        self._seen.add(image)
        self._waiting.pop(image.path, None)

    def failed(self, image: Image) -> bool:
        """It cannot be read; whether that is final, so that it does not come again as it is."""
        _, since = self._waiting[image.path]
        if Image.found(image.path) != image or time.monotonic() - since < self._patience:
            return False  # at the next look it may be gone, or another one
        self._given_up[image.path] = self._waiting.pop(image.path)[0]
        return True
