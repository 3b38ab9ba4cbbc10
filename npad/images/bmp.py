"""BMP of Windows and OS/2: its header is read here, its pixels are decoded by Pillow.

Pillow's own class for these files takes pixels of 4 or 8 bits for bits where the palette is black and
white, does not notice pixels whose colour is not in the palette, and in many versions loses its place
in run lengths.
"""

from __future__ import annotations

import struct
from typing import BinaryIO

import numpy as np
from PIL import Image

from npad.images.errors import ImageError
from npad.images.pillow import look_up
from npad.images.samples import Array, Reading, Samples
from npad.images.stored import Stored

__all__ = ["read_bmp"]

FILE_HEADER, MASKS_AT = 14, 54
RAW, RLE8, RLE4 = 0, 1, 2
MASKED, MASKED_WITH_ALPHA = 3, 6
OS2 = (16, 64)  # sizes of its second header, where 3 and 4 are other compressions
# How Pillow calls pixels of a compression and so many bits,
STORED = {(RAW, 1): "P;1", (RAW, 2): "P;2", (RAW, 4): "P;4", (RAW, 8): "P"}
STORED |= {(RLE4, 4): "P", (RLE8, 8): "P"}
STORED |= {(RAW, 16): "BGR;15", (RAW, 24): "BGR", (RAW, 32): "BGRX"}
# and those of so many bits of which these are red, green and blue.
COLOURS = {
    (16, 0x7C00, 0x3E0, 0x1F): "BGR;15",
    (16, 0xF800, 0x7E0, 0x1F): "BGR;16",
    (24, 0xFF0000, 0xFF00, 0xFF): "BGR",
    (32, 0xFF0000, 0xFF00, 0xFF): "BGRX",
    (32, 0xFF, 0xFF00, 0xFF0000): "RGBX",
    (32, 0xFF000000, 0xFF0000, 0xFF00): "XBGR",
    (32, 0xFF00, 0xFF0000, 0xFF000000): "XRGB",
}
GREYS = bytes(range(256))  # a palette of these is none
MAX_HEAD = 4096  # bytes that hold header, masks and palette


def read_bmp(file: BinaryIO, name: str, reading: Reading) -> Stored:
    """Read a BMP: palettes, also run-length encoded, and the usual colours of 16 to 32 bits."""
    head = file.read(MAX_HEAD)
    start, header_size = struct.unpack_from("<II", head, 10)
    end = FILE_HEADER + header_size
    if header_size == 12:
        width, height, _, bits = struct.unpack_from("<HHHH", head, 18)
        compression, n_colours, entry = RAW, 0, "BGR"
    else:
        header = head[18:end].ljust(32, b"\0")  # OS/2 leaves off what is zero
        width, height, _, bits, compression, n_colours = struct.unpack_from("<iiHHI12xI", header)
        entry = "BGRX"
    step = 1 if height < 0 else -1  # from the first row, or from the last
    height = abs(height)
    stored, kind = STORED.get((compression, bits)), f"compression {compression}"
    has_alpha = False
    if compression in (MASKED, MASKED_WITH_ALPHA) and header_size not in OS2:
        *masks, of_alpha = struct.unpack_from("<IIII", head, MASKS_AT)
        stored = COLOURS.get((bits, *masks)) if any(masks) else STORED.get((RAW, bits))
        kind = "unusual channels"
        tells_alpha = header_size >= 56 or compression == MASKED_WITH_ALPHA
        has_alpha = tells_alpha and bits == 32 and of_alpha == 0xFFFFFFFF - sum(masks)
    if stored is None:
        raise ImageError(name, f"a BMP of {bits} bits and {kind}: not read; save it as PNG")
    n_colours = 0 if bits > 8 else n_colours or 1 << bits
    if start <= end:  # some writers forget the palette, or all of it
        start = end + n_colours * len(entry)
    palette = head[end : min(start, end + n_colours * len(entry))]

    def decoded(mode: str, stored: str) -> Image.Image:
        file.seek(start)
        data = file.read()
        stride = (width * bits + 31) // 32 * 4
        if compression in (RLE8, RLE4):
            data, stride = _run_lengths(data, width, height, nibbles=compression == RLE4), width
        if len(data) < stride * (height - 1):  # before there is memory for the image
            raise ValueError("not enough image data")
        return Image.frombytes(mode, (width, height), data, "raw", stored, stride, step)

    def decode() -> Samples:
        if bits > 8:
            return Samples(decoded("RGB", stored))
        blue_green_red = [palette[i :: len(entry)] for i in range(3)]
        if (bits, compression) == (8, RAW) and blue_green_red == [GREYS] * 3:
            return Samples(decoded("L", "L"))
        return Samples(look_up(decoded("P", stored), palette, entry, name))

    def alpha() -> Array:
        return np.asarray(decoded("RGBA", stored.replace("X", "A")).getchannel("A"))

    return Stored((height, width), decode, alpha=alpha if has_alpha else None)


def _run_lengths(data: bytes, width: int, height: int, *, nibbles: bool) -> bytes:
    """Rows of one byte per pixel, in the order of the file; pixels that are skipped are 0."""
    out = bytearray(width * height)
    at, x, y = 0, 0, 0
    while y < height - 1 or (y == height - 1 and x < width):
        n, value = data[at], data[at + 1]
        at += 2
        if n:
            run = bytes([value >> 4, value & 15]) * (n // 2 + 1) if nibbles else bytes([value]) * n
        elif value == 0:  # end of the row
            x, y = 0, y + 1
            continue
        elif value == 1:  # end of the image
            break
        elif value == 2:  # a step
            x, y, at = x + data[at], y + data[at + 1], at + 2
            continue
        else:  # as many pixels as they are
            n = value
            n_bytes = (n + 1) // 2 if nibbles else n
            run = data[at : at + n_bytes]
            if len(run) < n_bytes:
                raise ValueError("not enough image data")
            if nibbles:
                run = bytes(half for byte in run for half in (byte >> 4, byte & 15))
            at += n_bytes + n_bytes % 2
        run = run[: min(n, max(0, width - x))]
        out[y * width + x : y * width + x + len(run)] = run
        x += n
    return bytes(out)
