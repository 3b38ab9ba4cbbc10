"""Folders: which of their files are images, and what is left out."""

from __future__ import annotations

import os
import warnings
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from npad.images.errors import ImageError

__all__ = [
    "OUTPUT_MARK",
    "SUFFIXES",
    "Found",
    "find_images",
    "is_litter",
    "list_images",
    "search",
    "warn_of_left_out",
]


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


SUFFIXES = _words(".bmp .dib .jfif .jpe .jpeg .jpg .pbm .pgm .png .pnm .ppm .tif .tiff .webp")
OUTPUT_MARK = ".npad-output"  # a file in each folder that npad fills with pictures of its own

# What is expected beside images and no image. All else that is left out is told.
COMPANIONS = _words(
    """
    .txt .md .rst .log .lst .csv .tsv .json .jsonl .xml .yaml .yml .toml .ini .cfg .conf .db .html .htm
    .css .js .pdf .doc .docx .odt .xls .xlsx .ods .ppt .pptx .py .ipynb .sh .bat .ps1 .m .lnk .url
    .md5 .sha1 .sha256 .sfv .xmp .aae .wld .tfw .jgw .pgw .prj .names .npad .pt .pth .ckpt .onnx
    .safetensors
    """
)
PAPERS = _words("readme license licence copying notice authors changelog version")
# Thumbnails, bins and snapshots that file servers and systems keep among the user's folders.
LITTER = frozenset(
    {
        *("@eadir", "#recycle", "@recycle", "@recently-snapshot", "#snapshot", "~snapshot", "@tmp"),
        *("__macosx", "lost+found", "$recycle.bin", "recycler", "system volume information"),
    }
)

# How files are counted that have no suffix to be counted by.
NO_SUFFIX = "without suffix"
BROKEN = "linked to nothing"
SPECIAL = "not regular (pipe, socket, device)"
OUTPUT = "written by npad"
_NAMED = 6  # kinds that a message names


@dataclass(frozen=True)
class Found:
    """What lies in a folder and its subfolders.

    Attributes
    ----------
    images : paths, sorted
    left_out : how many files of each suffix, or of each kind that has none, are no images
    """

    images: list[Path] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)

    def nothing(self) -> str:
        """What an error says where there are no images."""
        text = f"the folder holds no images ({', '.join(sorted(SUFFIXES))})"
        return f"{text}, but {_counts(self.left_out)}" if self.left_out else text


def list_images(folder: str | os.PathLike[str]) -> list[Path]:
    """Image files in a folder and its subfolders, sorted, chosen by suffix.

    Left out are hidden files and folders (some systems put a "._name.png" beside each image), what
    file servers keep for themselves, such as ``@eaDir``, and npad's own output. Linked folders are
    followed; one that is reached in several ways is read once.

    Raises
    ------
    ImageError
        The folder does not exist, is not a folder, cannot be read, or is npad's own output.

    Warns
    -----
    UserWarning
        Files were left out that may be images: their suffixes and numbers.
    """
    found = search(folder)
    warn_of_left_out(folder, found.left_out)
    return found.images


def find_images(folder: str | os.PathLike[str]) -> list[Path]:
    """As `list_images`, for who needs images: a folder without is an error that says what is there.

    Raises
    ------
    ImageError
        As `list_images`; or there are no images.

    Warns
    -----
    UserWarning
        As `list_images`.
    """
    found = search(folder)
    if not found.images:
        raise ImageError(folder, found.nothing())
    warn_of_left_out(folder, found.left_out)
    return found.images


def search(folder: str | os.PathLike[str]) -> Found:
    """As `list_images`, but what is left out is handed back.

    Raises
    ------
    ImageError
        As `list_images`.
    """
    root = Path(folder)
    above = Path(os.path.realpath(root)).parents
    if any(_exists(place / OUTPUT_MARK) for place in (root, *above)):
        raise ImageError(root, "the folder is npad's own output: give one with images")
    found = Found()
    seen: set[tuple[int, int]] = set()
    todo = deque([(root, False)])
    while todo:
        parent, through_link = todo.popleft()
        try:
            status = parent.stat()
            with os.scandir(parent) as scan:
                entries = sorted(scan, key=lambda entry: entry.name)
        except OSError as error:
            raise ImageError(parent, f"the folder cannot be read: {error.strerror}") from error
        identity = status.st_dev, status.st_ino
        if through_link and identity in seen:
            continue
        seen.add(identity)
        if any(entry.name == OUTPUT_MARK for entry in entries):
            found.left_out[OUTPUT] += len(entries) - 1
            continue
        for entry in entries:
            if is_litter(entry.name):
                continue
            path = Path(entry.path)
            if not _is(entry, "dir"):
                _take(entry, path, found)
            elif entry.is_symlink():  # after all that can be reached without links
                todo.append((path, True))
            else:
                todo.appendleft((path, through_link))
    found.images.sort()
    return found


def is_litter(name: str) -> bool:
    """Whether a file or folder of this name is hidden, or a file server's own."""
    return name.startswith(".") or name.lower() in LITTER


def warn_of_left_out(folder: str | os.PathLike[str], left_out: Mapping[str, int]) -> None:
    """Say how many files were left out that may be images.

    Warns
    -----
    UserWarning
        There are some.
    """
    told = {kind: n for kind, n in left_out.items() if kind not in COMPANIONS | {OUTPUT}}
    if told:
        n = sum(told.values())
        warnings.warn(
            f"{os.fspath(folder)}: {n} file{' was' if n == 1 else 's were'} left out, by suffix: "
            f"{_counts(told)} (what is read: {', '.join(sorted(SUFFIXES))})",
            UserWarning,
            stacklevel=3,
        )


def _take(entry: os.DirEntry[str], path: Path, found: Found) -> None:
    """Count a file among the images or by its kind. A broken link is met when the image is read."""
    suffix = path.suffix.lower()
    regular = _is(entry, "file")
    if not regular and _exists(path):
        found.left_out[SPECIAL] += 1
    elif suffix in SUFFIXES:
        found.images.append(path)
    elif not regular:
        found.left_out[BROKEN] += 1
    elif suffix or path.name.lower() not in PAPERS:
        found.left_out[suffix or NO_SUFFIX] += 1


def _is(entry: os.DirEntry[str], kind: str) -> bool:
    try:
        return entry.is_dir() if kind == "dir" else entry.is_file()
    except OSError:  # a link that leads in a circle, or to where one may not look
        return False


def _exists(path: Path) -> bool:
    return os.path.exists(path)  # noqa: PTH110  (pathlib's raises where one may not look)


def _counts(kinds: Mapping[str, int]) -> str:
    """The most frequent kinds, such as "10 .dng, 2 .jp2"."""
    ordered = sorted(kinds.items(), key=lambda item: (-item[1], item[0]))
    texts = [f"{n} {kind}" for kind, n in ordered[:_NAMED]]
    others = sum(n for _, n in ordered[_NAMED:])
    return ", ".join([*texts, *([f"{others} others"] if others else [])])
