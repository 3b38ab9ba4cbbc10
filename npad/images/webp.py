"""WebP."""

from __future__ import annotations

import struct
from typing import BinaryIO

from PIL import Image, _webp

from npad.images.orientation import exif_orientation, upright, xmp_orientation
from npad.images.samples import Reading, Samples, check_size

__all__ = ["read_webp"]


def read_webp(file: BinaryIO, name: str, reading: Reading) -> Samples:
    """Read a WebP; of an animation, the first frame."""
    data = file.read()
    width, height = _size(data)
    check_size(width, height, name, reading)
    # Pillow's own class for these files looks at the program's limit of pixels.
    decoder = _webp.WebPAnimDecoder(data)
    *_, n_pages, stored = decoder.get_info()
    frame = decoder.get_next()
    if frame is None:
        raise ValueError("the first frame cannot be decoded")
    image = Image.frombytes("RGB", (width, height), frame[0], "raw", stored.replace("A", "X"))
    exif, xmp = (decoder.get_chunk(kind) or b"" for kind in ("EXIF", "XMP "))
    return Samples(upright(image, exif_orientation(exif) or xmp_orientation(xmp)), n_pages=n_pages)


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
