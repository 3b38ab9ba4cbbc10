"""What is wrong with an image or a folder of images."""

from __future__ import annotations

import os

from npad.file_names import shown

__all__ = ["ImageError"]


class ImageError(ValueError):
    """An image or a folder of images that cannot be used.

    Attributes
    ----------
    path : str
        The file or folder, or ``"image[17]"`` for a position in an array.
    reason : str
        What is wrong and what to do.
    """

    def __init__(self, path: str | os.PathLike[str], reason: str) -> None:
        super().__init__(os.fspath(path), reason)
        self.path = os.fspath(path)
        self.reason = reason

    def __str__(self) -> str:
        return f"{shown(self.path)}: {self.reason}"
