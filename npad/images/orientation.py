"""Which way up an image is, as its metadata say."""

from __future__ import annotations

import re
import struct

from PIL import Image

from npad.images.samples import Array

__all__ = ["TURNS_AXES", "exif_orientation", "upright", "xmp_orientation"]

TAG = 274
# How a value of the tag is stored, by the number of its type.
TYPES = {1: "B", 3: "H", 4: "I"}
TRANSPOSE = Image.Transpose
METHODS = {
    2: TRANSPOSE.FLIP_LEFT_RIGHT,
    3: TRANSPOSE.ROTATE_180,
    4: TRANSPOSE.FLIP_TOP_BOTTOM,
    5: TRANSPOSE.TRANSPOSE,
    6: TRANSPOSE.ROTATE_270,
    7: TRANSPOSE.TRANSVERSE,
    8: TRANSPOSE.ROTATE_90,
}
TURNS_AXES = (5, 6, 7, 8)  # width becomes height
XMP = re.compile(rb"tiff:Orientation\s*(?:=\s*[\"']|>)\s*([1-8])")


def exif_orientation(exif: bytes) -> int | None:
    """The orientation, 1 to 8, as far as the bytes can be read: other tags may be damaged."""
    exif = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(exif[:2], "")
    try:
        (start,) = struct.unpack_from(order + "I", exif, 4)
        (n_tags,) = struct.unpack_from(order + "H", exif, start)
        for at in range(start + 2, start + 2 + 12 * n_tags, 12):
            tag, kind = struct.unpack_from(order + "HH", exif, at)
            if tag == TAG and kind in TYPES:
                (value,) = struct.unpack_from(order + TYPES[kind], exif, at + 8)
                return value if 1 <= value <= 8 else None
    except struct.error:
        pass
    return None


def xmp_orientation(xmp: bytes) -> int | None:
    """The orientation in the XML that some programs write instead of EXIF."""
    found = XMP.search(xmp)
    return int(found[1]) if found else None


def upright(values: Image.Image | Array, orientation: int) -> Image.Image | Array:
    """Turn what is stored in an orientation, 1 to 8, as it is meant to be seen."""
    if orientation == 1:
        return values
    if isinstance(values, Image.Image):
        return values.transpose(METHODS[orientation])
    turned = values.swapaxes(0, 1) if orientation in TURNS_AXES else values
    # What is left to do is to mirror columns, rows or both.
    columns, rows = orientation in (2, 3, 6, 7), orientation in (3, 4, 7, 8)
    return turned[:: -1 if rows else 1, :: -1 if columns else 1]
