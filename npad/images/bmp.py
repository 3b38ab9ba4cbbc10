"""BMP of Windows and OS/2."""

from __future__ import annotations

import struct
from typing import BinaryIO

import numpy as np

from npad.images.errors import ImageError
from npad.images.pillow import decode_raw, read_array
from npad.images.samples import Array, Reading, Samples, check_size

__all__ = ["read_bmp"]

FILE_HEADER, MASKS_AT = 14, 54
RAW, RLE8, RLE4, BITFIELDS, ALPHA_BITFIELDS = 0, 1, 2, 3, 6
OS2 = (16, 64)  # sizes of its second header, where 3 and 4 are other compressions
# The bits of red, green and blue, where the file does not tell.
MASKS = {16: (0x7C00, 0x3E0, 0x1F)} | dict.fromkeys((24, 32), (0xFF0000, 0xFF00, 0xFF))
RAMP = np.arange(256)[:, None].repeat(3, 1)  # a palette of grey that is no palette
MAX_HEAD = 4096  # bytes that hold header, masks and palette


def read_bmp(file: BinaryIO, name: str, reading: Reading) -> Samples:
    """Read a BMP: palettes, also run-length encoded, and 16 to 32 bits a pixel, alpha dropped."""
    head = file.read(MAX_HEAD)
    start, size = struct.unpack_from("<II", head, 10)
    end = FILE_HEADER + size  # of the header
    if size == 12:
        width, height, _, bits = struct.unpack_from("<HHHH", head, 18)
        compression, n_colours, colour_bytes = RAW, 0, 3
    else:
        header = head[18:end].ljust(32, b"\0")  # OS/2 leaves off what is zero
        width, height, _, bits, compression, n_colours = struct.unpack_from("<iiHHI12xI", header)
        colour_bytes = 4
    known = (RAW, RLE8, RLE4) if size in OS2 else (RAW, RLE8, RLE4, BITFIELDS, ALPHA_BITFIELDS)
    if compression not in known or bits not in (1, 2, 4, 8, 16, 24, 32):
        raise ImageError(
            name, f"a BMP of {bits} bits and compression {compression}: not read; save it as PNG"
        )
    top_down, height = height < 0, abs(height)
    check_size(width, height, name, reading)
    n_colours = 0 if bits > 8 else n_colours or 1 << bits
    if start <= end:  # some writers forget the palette, or all of it
        start = end + n_colours * colour_bytes
    masks = MASKS.get(bits, ())
    if bits > 8 and compression != RAW:
        masks = struct.unpack_from("<III", head, MASKS_AT)
        masks = masks if any(masks) else MASKS[bits]

    palette = np.frombuffer(head[end : min(start, end + n_colours * colour_bytes)], np.uint8)
    palette = palette[: len(palette) // colour_bytes * colour_bytes].reshape(-1, colour_bytes)
    colours = palette[:, 2::-1]
    file.seek(start)
    stride = (width * bits + 31) // 32 * 4
    step = 1 if top_down else -1
    if bits >= 24 and masks == MASKS[bits]:
        stored = "BGR" if bits == 24 else "BGRX"
        return Samples(decode_raw("RGB", (width, height), file, stored, stride, step))
    if bits == 8 and compression == RAW and np.array_equal(colours, RAMP):
        return Samples(decode_raw("L", (width, height), file, "L", stride, step))
    if compression in (RLE8, RLE4):
        rows = _run_lengths(file.read(), width, height, nibbles=compression == RLE4)
        bits = 8
    else:
        filling = stride - (width * bits + 7) // 8  # the last row may lack it
        rows = read_array(file, (height, stride), np.dtype(np.uint8), filling)
    rows = rows[::step]
    if bits > 8:
        return _unpack(rows[:, : width * bits // 8].view(f"<u{bits // 8}"), masks, name)
    return Samples(_look_up(rows, bits, width, colours))


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
    return grey[indices]


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


def _run_lengths(data: bytes, width: int, height: int, *, nibbles: bool) -> Array:
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
    return np.frombuffer(out, np.uint8).reshape(height, width)
