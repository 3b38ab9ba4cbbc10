"""Folders: which of their files are images."""

from __future__ import annotations

import os
from pathlib import Path

from npad.images.errors import ImageError

__all__ = ["OUTPUT_MARK", "SUFFIXES", "list_images"]

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"})
OUTPUT_MARK = ".npad-output"  # a file in each folder that npad fills with pictures of its own


def list_images(folder: str | os.PathLike[str]) -> list[Path]:
    """Image files in a folder and its subfolders, sorted, chosen by suffix.

    Hidden files and folders are left out (some systems put a "._name.png" beside each image).

    Raises
    ------
    ImageError
        The folder does not exist, is not a folder, or cannot be read.
    """

    def fail(error: OSError) -> None:
        raise ImageError(error.filename, f"the folder cannot be read: {error.strerror}")

    found: list[Path] = []
    for parent, folders, files in os.walk(folder, onerror=fail):
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".") and not Path(parent, name, OUTPUT_MARK).exists()
        ]
        found += [
            Path(parent, name)
            for name in files
            if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES
        ]
    return sorted(found)
