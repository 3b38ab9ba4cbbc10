"""WebP."""

from __future__ import annotations

from typing import BinaryIO

import numpy as np
from PIL import Image, _webp

from npad.images.orientation import exif_orientation, xmp_orientation
from npad.images.samples import Array, Reading, Samples
from npad.images.stored import Stored

__all__ = ["read_webp"]


def read_webp(file: BinaryIO, name: str, reading: Reading) -> Stored:
    """Read a WebP; of an animation, the first frame."""
    # Pillow's own class for these files refuses what is above the program's limit of pixels.
    decoder = _webp.WebPAnimDecoder(file.read())
    *size, _, _, n_pages, stored = decoder.get_info()
    width, height = size if len(size) == 2 else size[0]  # by Pillow's version

    def frame(mode: str, stored: str) -> Image.Image:
        decoder.reset()
        first = decoder.get_next()
        if first is None:
            raise ValueError("the first frame cannot be decoded")
        return Image.frombytes(mode, (width, height), first[0], "raw", stored)

    def alpha() -> Array:
        return np.asarray(frame("RGBA", "RGBA").getchannel("A"))

    exif, xmp = (decoder.get_chunk(kind) or b"" for kind in ("EXIF", "XMP "))
    return Stored(
        (height, width),
        lambda: Samples(frame("RGB", "RGBX")),
        exif_orientation(exif) or xmp_orientation(xmp),
        n_pages,
        alpha if stored == "RGBA" else None,
    )
