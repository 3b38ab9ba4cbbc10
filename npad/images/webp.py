"""WebP."""

from __future__ import annotations

import struct
from typing import BinaryIO

import numpy as np
from PIL import Image, _webp

from npad.images.orientation import exif_orientation, xmp_orientation
from npad.images.samples import Array, Reading, Samples, check_size
from npad.images.stored import Stored

__all__ = ["read_webp"]


def read_webp(file: BinaryIO, name: str, reading: Reading) -> Stored:
    """Read a WebP; of an animation, the first frame."""
    data = file.read()
    width, height = _size(data)
    check_size(width, height, name, reading)  # the decoder takes memory at once
    # Pillow's own class for these files refuses what is above the program's limit of pixels.
    decoder = _webp.WebPAnimDecoder(data)
    *_, n_pages, stored = decoder.get_info()

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
        exif_orientation(exif) or xmp_orientation(xmp) or 1,
        n_pages,
        alpha if stored == "RGBA" else None,
    )


def _size(data: bytes) -> tuple[int, int]:
    """Width and height, where each kind of WebP has them."""
    kind = data[12:16]
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    if kind == b"VP8L":
        (both,) = struct.unpack_from("<I", data, 21)
        return (both & 0x3FFF) + 1, (both >> 14 & 0x3FFF) + 1
    if kind == b"VP8X":
        wide, high = data[24:27], data[27:30]
        return int.from_bytes(wide, "little") + 1, int.from_bytes(high, "little") + 1
    raise ValueError("unknown kind of WebP")
