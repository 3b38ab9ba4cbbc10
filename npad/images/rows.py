"""Rows of an image of Pillow's."""

from __future__ import annotations

from PIL import Image

__all__ = ["rows_of"]


def rows_of(image: Image.Image, first: int, last: int) -> Image.Image:
    """A copy of some rows. Pillow's ``crop`` asks the process's limit of pixels whether it may be."""
    part = Image.new(image.mode, (image.width, last - first), None)
    part.paste(image, (0, -first))
    return part
