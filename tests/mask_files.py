"""Image files written without the library that reads them."""

import io
import struct
import zlib

import numpy as np
import tifffile

GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6  # colour types of PNG


def png(samples, colour, bits=8, *, palette=None, transparency=None, exif=None):
    """A PNG file of (H, W, C) samples."""
    height, width = samples.shape[:2]
    flat = samples.reshape(height, -1)
    if bits == 16:
        rows = flat.astype(">u2").view(np.uint8).reshape(height, -1)
    elif bits == 8:
        rows = flat.astype(np.uint8)
    else:
        of_bits = (flat[..., None].astype(np.uint8) >> np.arange(bits)[::-1]) & 1
        rows = np.packbits(of_bits.reshape(height, -1), axis=1)
    parts = [("IHDR", struct.pack(">2I5B", width, height, bits, colour, 0, 0, 0))]
    parts += [("PLTE", bytes(np.uint8(palette)))] if palette is not None else []
    parts += [("tRNS", transparency)] if transparency else []
    parts += [("eXIf", exif)] if exif else []
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    parts += [("IDAT", zlib.compress(raw)), ("IEND", b"")]
    chunks = (
        struct.pack(">I", len(data)) + name.encode() + data
        + struct.pack(">I", zlib.crc32(name.encode() + data))
        for name, data in parts
    )  # fmt: skip
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def tiff(samples, **options):
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, samples, **options)
    return buffer.getvalue()


def orientation(value):
    """EXIF that says this and nothing else."""
    return b"MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 274, 3, 1, value, 0, 0)
