"""Image files of every kind, written byte by byte: what is in them is known without a library."""

import struct
import zlib

import numpy as np

# --- PNG

GREY, RGB, PALETTE, GREY_ALPHA, RGB_ALPHA = 0, 2, 3, 4, 6
PNG = b"\x89PNG\r\n\x1a\n"
ADAM7 = [
    (0, 0, 8, 8),
    (0, 4, 8, 8),
    (4, 0, 8, 4),
    (0, 2, 4, 4),
    (2, 0, 4, 2),
    (0, 1, 2, 2),
    (1, 0, 2, 1),
]


def chunk(kind, data=b""):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(values, bits, colour, *, interlaced=False, before=(), after=(), level=6):
    """Values (H, W) or (H, W, channels) of so many bits; chunks before and after the pixels."""
    height, width = values.shape[:2]
    passes = ADAM7 if interlaced else [(0, 0, 1, 1)]
    parts = [values[y::dy, x::dx] for y, x, dy, dx in passes]
    rows = b"".join(_filtered(part, bits) for part in parts if part.size)
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, interlaced)
    stream = zlib.compress(rows, level)
    half = len(stream) // 2
    chunks = [chunk(b"IHDR", header), *before, chunk(b"IDAT", stream[:half]), chunk(b"IDAT")]
    return PNG + b"".join([*chunks, chunk(b"IDAT", stream[half:]), *after, chunk(b"IEND")])


def _packed(values, bits):
    """Rows of bytes, (H, bytes of a row)."""
    height = len(values)
    if bits == 16:
        return np.ascontiguousarray(values, ">u2").reshape(height, -1).view(np.uint8)
    if bits == 8:
        return values.astype(np.uint8).reshape(height, -1)
    flags = (values.reshape(height, -1, 1) >> np.arange(bits)[::-1]) & 1
    return np.packbits(flags.reshape(height, -1).astype(np.uint8), axis=1)


def _filtered(values, bits):
    """The rows, each with another of the five filters in front."""
    rows = _packed(values, bits).astype(int)
    channels = values.shape[2] if values.ndim == 3 else 1
    step = max(1, bits * channels // 8)
    left, up = np.zeros_like(rows), np.zeros_like(rows)
    left[:, step:], up[1:] = rows[:, :-step], rows[:-1]
    corner = np.zeros_like(rows)
    corner[1:, step:] = rows[:-1, :-step]
    near = [abs(left + up - corner - x) for x in (left, up, corner)]
    a, b, c = near
    paeth = np.where((a <= b) & (a <= c), left, np.where(b <= c, up, corner))
    guesses = [0 * rows, left, up, (left + up) // 2, paeth]
    return b"".join(
        bytes([i % 5]) + bytes((row - guesses[i % 5][i] & 255).astype(np.uint8))
        for i, row in enumerate(rows)
    )


# --- BMP


def bmp(rows, width, height, bits, *, compression=0, palette=b"", masks=b"", header=40, rgb=3):
    """Rows as they are stored, or what they are compressed to; a negative height is top-down."""
    if header == 12:
        info = struct.pack("<IHHHH", 12, width, height, 1, bits)
    else:
        n_colours = len(palette) // 4
        fields = (width, height, 1, bits, compression, len(rows), 2835, 2835, n_colours, 0)
        info = struct.pack("<IiiHHIIiiII", header, *fields)[:header]
        if header > 40:
            info = (info + masks).ljust(header, b"\0")
            masks = b""
    start = 14 + len(info) + len(masks) + len(palette)
    return (
        struct.pack("<2sIHHI", b"BM", start + len(rows), 0, 0, start)
        + info
        + masks
        + palette
        + rows
    )


def bmp_rows(values, bits, *, top_down=False):
    """Rows of packed values, filled up to four bytes."""
    if bits > 8:
        size = bits // 8
        packed = values.astype("<u4").reshape(*values.shape, 1).view(np.uint8)[..., :size]
        packed = packed.reshape(len(values), -1)
    else:
        packed = _packed(values, bits)
    packed = np.pad(packed, [(0, 0), (0, -packed.shape[1] % 4)])
    return (packed if top_down else packed[::-1]).tobytes()


# --- PNM


def pnm(kind, values, maxval=None, comment=""):
    """P1 to P6 of (H, W) or (H, W, 3) values."""
    height, width = values.shape[:2]
    numbers = [width, height] if maxval is None else [width, height, maxval]
    header = f"P{kind}\n{comment}" + "\n".join(map(str, numbers)) + "\n"
    if kind <= 3:
        return (header + "\n".join(" ".join(map(str, row.ravel())) for row in values)).encode()
    if kind == 4:
        return header.encode() + np.packbits(values.astype(np.uint8), axis=1).tobytes()
    return header.encode() + values.astype(">u2" if maxval > 255 else np.uint8).tobytes()


# --- JPEG


def segment(marker, data):
    return struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data


def jpeg(blocks, *, extra=b"", frame=0xC0, bits=8, identifiers=(1, 2, 3, 4)):
    """A baseline JPEG of (rows, columns, channels) values, each of which fills a block of 8 x 8."""
    rows, columns, channels = blocks.shape
    parts = [(identifiers[c], 0x11, 0) for c in range(channels)]
    size = struct.pack(">BHHB", bits, 8 * rows, 8 * columns, channels)
    header = b"".join(
        [
            extra,
            segment(0xDB, bytes([0]) + bytes([8] * 64)),
            segment(frame, size + b"".join(map(bytes, parts))),
            segment(0xC4, bytes([0x00, 0, 0, 0, 12, *[0] * 12, *range(12)])),  # codes of four bits
            segment(0xC4, bytes([0x10, 1, *[0] * 15, 0])),  # one code, which ends a block
            segment(0xDA, bytes([channels, *(n for p in parts for n in (p[0], 0)), 0, 63, 0])),
        ]
    )
    stream, before = [], [0] * channels
    for block in np.round(blocks.reshape(-1, channels) - 128.0):
        for c, value in enumerate(block):
            step, before[c] = int(value - before[c]), int(value)
            n = abs(step).bit_length()
            stream.append(
                f"{n:04b}" + (f"{step if step > 0 else step + 2**n - 1:0{n}b}" if n else "") + "0"
            )
    coded = "".join(stream)
    coded += "1" * (-len(coded) % 8)
    data = int(coded, 2).to_bytes(len(coded) // 8, "big").replace(b"\xff", b"\xff\0")
    return b"\xff\xd8" + header + data + b"\xff\xd9"


def adobe(transform):
    return segment(0xEE, b"Adobe" + struct.pack(">HHHB", 100, 0, 0, transform))


# --- orientation


def exif(orientation, order="<", *, damaged=False):
    """A TIFF header and a directory of two tags; the other may point nowhere, and the next one too."""
    lost = 0xFFFFFF00 if damaged else 0
    head = {"<": b"II", ">": b"MM"}[order] + struct.pack(order + "HI", 42, 8)
    text = struct.pack(order + "HHII", 270, 2, 90 if damaged else 1, lost)
    turned = struct.pack(order + "HHIHH", 274, 3, 1, orientation, 0)
    return (
        head
        + struct.pack(order + "H", 200 if damaged else 2)
        + text
        + turned
        + struct.pack("<I", lost)
    )


def xmp(orientation):
    return f'<x:xmpmeta><rdf:Description tiff:Orientation="{orientation}"/></x:xmpmeta>'.encode()


def as_stored(upright, orientation):
    """What a sensor turned that way writes of an image."""
    return {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(upright, -1),
    }[orientation]
