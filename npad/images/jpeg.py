"""JPEG: its segments are read here, its pixels are decoded by Pillow."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import BinaryIO

from PIL import Image

from npad.images.errors import ImageError
from npad.images.orientation import exif_orientation, xmp_orientation
from npad.images.samples import Reading, Samples
from npad.images.stored import Stored

__all__ = ["read_jpeg"]

START_OF_SCAN, APP1, APP2, APP14 = 0xDA, 0xE1, 0xE2, 0xEE
# Baseline, extended and progressive; of Huffman's and of arithmetic codes.
DCT_FRAMES = (0xC0, 0xC1, 0xC2, 0xC9, 0xCA)
OTHER_FRAMES = {0xF7: "JPEG-LS"} | dict.fromkeys((0xC3, 0xCB), "lossless JPEG")
OTHER_FRAMES |= dict.fromkeys((0xC5, 0xC6, 0xC7, 0xCD, 0xCE, 0xCF, 0xDE), "hierarchical JPEG")
BARE = (0x01, *range(0xD0, 0xD9))  # markers without a length
XMP = b"http://ns.adobe.com/xap/1.0/\0"


def read_jpeg(file: BinaryIO, name: str, reading: Reading) -> Stored:
    """Read a JPEG of 8 bits: grey, YCbCr, RGB, CMYK or YCCK; of several pictures (MPO) the first."""
    frame = None
    adobe, n_pages = False, 1
    orientation = of_xmp = None
    for marker, body in _segments(file):
        if marker in OTHER_FRAMES:
            raise ImageError(
                name, f"a {OTHER_FRAMES[marker]} image: not read; save it as PNG or TIFF"
            )
        if marker in DCT_FRAMES:
            frame = struct.unpack_from(">BHHB", body)
        elif marker == APP14 and body.startswith(b"Adobe"):
            adobe = True
        elif marker == APP1 and body.startswith(b"Exif\0\0"):
            orientation = orientation or exif_orientation(body)
        elif marker == APP1 and body.startswith(XMP):
            of_xmp = xmp_orientation(body)
        elif marker == APP2 and body.startswith(b"MPF\0"):
            n_pages = _n_pictures(body[4:])
    if frame is None:
        raise ValueError("no frame")
    bits, height, width, channels = frame
    if bits != 8:
        raise ImageError(name, f"a JPEG of {bits} bits: not read; save it as 16-bit PNG or TIFF")
    if height == 0:
        raise ImageError(name, "a JPEG that tells its height at its end: not read; save it again")
    if channels not in (1, 3, 4):
        raise ImageError(name, f"a JPEG of {channels} channels: not read; save it as RGB or grey")
    mode = {1: "L", 3: "RGB", 4: "CMYK"}[channels]
    # Adobe stores how much light the ink leaves.
    stored = "CMYK;I" if channels == 4 and adobe else mode

    def decode(reduction: int = 1) -> Samples:
        file.seek(0)
        size = (-(-width // reduction), -(-height // reduction))
        image = Image.frombytes(mode, size, file.read(), "jpeg", stored, "", reduction, 0)
        if mode == "CMYK":
            image = image.convert("RGB")
        if width % reduction or height % reduction:
            # The last pixels are not filled: the rest is stretched.
            size = (width // reduction, height // reduction)
            box = (0, 0, width / reduction, height / reduction)
            image = image.resize(size, Image.Resampling.BILINEAR, box)
        return Samples(image)

    def reduced(least: tuple[int, int]) -> Samples:
        spare = min(height // least[0], width // least[1]) // 2
        return decode(max(factor for factor in (1, 2, 4, 8) if factor <= max(spare, 1)))

    return Stored(
        (height, width),
        decode,
        orientation or of_xmp or 1,
        n_pages,
        reduced=reduced,
        is_jpeg=True,
    )


def _segments(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Marker and body of each segment before the first scan."""
    file.seek(2)
    marker = 0
    while marker != START_OF_SCAN:
        while file.read(1)[0] != 0xFF:  # there may be rubbish between segments
            pass
        while (marker := file.read(1)[0]) == 0xFF:
            pass
        if marker != 0 and marker not in BARE:
            (length,) = struct.unpack(">H", file.read(2))
            yield marker, file.read(length - 2)


def _n_pictures(index: bytes) -> int:
    """The number that the index of a multi-picture file gives."""
    order = "<" if index.startswith(b"II") else ">"
    at = struct.unpack_from(order + "I", index, 4)[0]
    for entry in range(at + 2, len(index) - 11, 12):
        tag, value = struct.unpack_from(order + "H6xI", index, entry)
        if tag == 0xB001:
            return max(1, value)
    return 1
