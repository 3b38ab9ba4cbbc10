"""TIFF."""

from __future__ import annotations

from typing import BinaryIO

from PIL import TiffImagePlugin

from npad.images.pillow import read_pillow
from npad.images.samples import Reading, Samples

__all__ = ["read_tiff"]


def read_tiff(file: BinaryIO, name: str, reading: Reading) -> Samples:
    """Read a TIFF as Pillow does."""
    return read_pillow(TiffImagePlugin.TiffImageFile(file), name, reading)
