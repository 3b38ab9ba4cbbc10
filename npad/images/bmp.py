"""BMP of Windows and OS/2."""

from __future__ import annotations

import struct
from typing import BinaryIO

import numpy as np

from npad.images.errors import ImageError
from npad.images.samples import Array, Reading, Samples, check_size

__all__ = ["read_bmp"]

FILE_HEADER, MASKS_AT = 14, 54
RAW, RLE8, RLE4, BITFIELDS, ALPHA_BITFIELDS = 0, 1, 2, 3, 6
OS2 = (16, 64)  # sizes of its second header, where 3 and 4 are other compressions
# The bits of red, green and blue, where the file does not tell.
MASKS = {16: (0x7C00, 0x3E0, 0x1F), 32: (0xFF0000, 0xFF00, 0xFF)}


def read_bmp(file: BinaryIO, name: str, reading: Reading) -> Samples:
    """Read a BMP: palettes, also run-length encoded, and 16 to 32 bits a pixel, alpha dropped."""
    data = file.read()
    start, size = struct.unpack_from("<II", data, 10)
    end = FILE_HEADER + size  # of the header
    if size == 12:
        width, height, _, bits = struct.unpack_from("<HHHH", data, 18)
        compression, n_colours, colour_bytes = RAW, 0, 3
    else:
        header = data[18:end].ljust(32, b"\0")  # OS/2 leaves off what is zero
        width, height, _, bits, compression, n_colours = struct.unpack_from("<iiHHI12xI", header)
        colour_bytes = 4
    known = (RAW, RLE8, RLE4) if size in OS2 else (RAW, RLE8, RLE4, BITFIELDS, ALPHA_BITFIELDS)
    if compression not in known or bits not in (1, 2, 4, 8, 16, 24, 32):
        raise ImageError(
            name, f"a BMP of {bits} bits and compression {compression}: not read; save it as PNG"
        )
    top_down, height = height < 0, abs(height)
    check_size(width, height, name, reading)
    if bits > 8:
        n_colours = 0
    elif not n_colours:
        n_colours = 1 << bits
    if start <= end:  # some writers forget the palette, or all of it
        start = end + n_colours * colour_bytes

    if compression in (RLE8, RLE4):
        rows = _run_lengths(data, start, width, height, nibbles=compression == RLE4)
        bits = 8
    else:
        stride = (width * bits + 31) // 32 * 4
        if len(data) >= start + stride * (height - 1) + (width * bits + 7) // 8:
            data = data.ljust(start + stride * height, b"\0")  # some do not fill up the last row
        rows = np.frombuffer(data, np.uint8, stride * height, start).reshape(height, stride)
    if not top_down:
        rows = rows[::-1]

    if bits <= 8:
        palette = np.frombuffer(data[end : min(start, end + n_colours * colour_bytes)], np.uint8)
        palette = palette[: len(palette) // colour_bytes * colour_bytes]
        return Samples(_look_up(rows, bits, width, palette.reshape(-1, colour_bytes)[:, 2::-1]))
    if bits == 24:
        return Samples(rows[:, : 3 * width].reshape(height, width, 3)[:, :, ::-1])
    masks = MASKS[bits]
    if compression != RAW:
        masks = struct.unpack_from("<III", data, MASKS_AT)
        masks = masks if any(masks) else MASKS[bits]
    if masks == MASKS[32]:
        return Samples(rows[:, : 4 * width].reshape(height, width, 4)[:, :, 2::-1])
    packed = rows[:, : width * bits // 8].view(f"<u{bits // 8}")
    return _unpack(packed, masks, name)


def _look_up(rows: Array, bits: int, width: int, colours: Array) -> Array:
    """The grey values or colours of pixels of 1 to 8 bits."""
    indices = rows
    if bits < 8:
        shifts = np.arange(8 - bits, -1, -bits, dtype=np.uint8)
        indices = (rows[:, :, None] >> shifts & (2**bits - 1)).reshape(len(rows), -1)
    indices = indices[:, :width]
    grey = colours[:, 0]
    if not (colours == grey[:, None]).all():
        return colours[indices]
    return indices if np.array_equal(grey, np.arange(256)) else grey[indices]


def _unpack(packed: Array, masks: tuple[int, ...], name: str) -> Samples:
    """Red, green and blue from the bits that each has of a number."""
    shifts = [(mask & -mask).bit_length() - 1 for mask in masks]
    whites = [mask >> max(shift, 0) for mask, shift in zip(masks, shifts, strict=True)]
    deep = max(whites) > 255
    if any(white & (white + 1) or not white for white in whites) or (deep and len({*whites}) > 1):
        raise ImageError(name, "a BMP of unusual channels: not read; save it as PNG")
    out = np.empty((*packed.shape, 3), np.uint16 if deep else np.uint8)
    for c, (mask, shift, white) in enumerate(zip(masks, shifts, whites, strict=True)):
        value = (packed & packed.dtype.type(mask)) >> packed.dtype.type(shift)
        spread = np.round(np.arange(white + 1) * (255 / white)).astype(np.uint8)
        out[..., c] = value if deep else spread[value]
    return Samples(out, whites[0] if deep else None)


def _run_lengths(data: bytes, start: int, width: int, height: int, *, nibbles: bool) -> Array:
    """Rows of one byte per pixel, in the order of the file; pixels that are skipped are 0."""
    out = bytearray(width * height)
    at, x, y = start, 0, 0
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
    return np.frombuffer(out, np.uint8).reshape(height, width)
