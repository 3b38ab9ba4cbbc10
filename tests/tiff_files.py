"""TIFF files written tag by tag, so that every field can be right, rare or wrong."""

import lzma
import struct
import zlib

import numpy as np

NONE, LZW, DEFLATE, LZMA, PACKBITS, OLD_DEFLATE, ZSTD = 1, 5, 8, 34925, 32773, 32946, 50000
REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
SIZES = {1: "B", 3: "H", 4: "I", 5: "2I", 7: "B", 9: "i", 11: "f", 12: "d", 16: "Q", 99: "B"}


def ramp(bits, n=1, shape=(21, 37), dtype=None):
    """(H, W, n) that grows along both axes, differs between samples, and holds 0 and the largest."""
    height, width = shape
    i = np.arange(height * width * n, dtype=np.float64).reshape(height, width, n)
    i = i / i.max()
    if dtype is not None:
        return i.astype(dtype)
    return np.round(i * (2**bits - 1)).astype(np.uint16 if bits > 8 else np.uint8)


def sensor(upright, orientation):
    """What a file of an orientation stores, of what is meant to be seen."""
    turned = {
        1: lambda a: a,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
        8: lambda a: np.rot90(a, -1),
    }
    return turned[orientation](upright)


def lzw(data):
    """Codes of nine bits that are single bytes: the table is cleared before codes grow."""
    codes = [256]
    for i, byte in enumerate(data):
        if i and i % 250 == 0:
            codes.append(256)
        codes.append(byte)
    bits = "".join(f"{code:09b}" for code in [*codes, 257])
    bits += "0" * (-len(bits) % 8)
    return int(bits, 2).to_bytes(len(bits) // 8, "big")


def packbits(data):
    """Some bytes as they are, and runs."""
    parts = [data[i : i + 100] for i in range(0, len(data), 100)]
    runs = [bytes([257 - len(p), p[0]]) if len({*p}) == 1 < len(p) else None for p in parts]
    return b"".join(r or bytes([len(p) - 1]) + p for p, r in zip(parts, runs, strict=True))


def zstandard(data):
    """A frame of blocks that are stored as they are."""
    frame = struct.pack("<IBI", 0xFD2FB528, 0xA0, len(data))
    for i in range(0, len(data), 1 << 16):
        block = data[i : i + (1 << 16)]
        last = i + len(block) == len(data)
        frame += (len(block) << 3 | last).to_bytes(3, "little") + block
    return frame


COMPRESS = {
    NONE: bytes,
    LZW: lzw,
    DEFLATE: zlib.compress,
    OLD_DEFLATE: zlib.compress,
    LZMA: lzma.compress,
    PACKBITS: packbits,
    ZSTD: zstandard,
}


def row_bytes(samples, bits, order, predictor=1):
    """(H, W, n) as rows of bytes, (H, bytes), with few bits packed from the highest down."""
    height, _, n = samples.shape
    if bits % 8:
        shifts = np.arange(bits - 1, -1, -1)
        each = (samples.reshape(height, -1, 1) >> shifts) & 1
        return np.packbits(each.reshape(height, -1).astype(np.uint8), axis=1)
    n_bytes = bits // 8
    if predictor == 2:
        samples = samples.view(f"u{n_bytes}")
        samples = np.diff(samples, axis=1, prepend=samples[:, :1] * 0)
    samples = samples.astype(samples.dtype.newbyteorder(">" if predictor == 3 else order))
    each = np.frombuffer(samples.tobytes(), np.uint8).reshape(height, -1)
    if predictor == 3:
        each = each.reshape(height, -1, n_bytes).swapaxes(1, 2).reshape(height, -1, n)
        each = np.diff(each, axis=1, prepend=each[:, :1] * 0).reshape(height, -1)
    return each


def tiff(
    samples,
    photometric=1,
    bits=None,
    order="<",
    big=False,
    compression=NONE,
    tile=None,
    rows_per_strip=None,
    planar=False,
    predictor=1,
    fill_order=1,
    compress=None,
    **tags,
):
    """The bytes of a file of one page; `tags` are those of `page`."""
    height, width, n = samples.shape
    bits = bits or samples.dtype.itemsize * 8
    compress = compress or COMPRESS[compression]
    pieces = []
    for plane in np.split(samples, n, axis=2) if planar else [samples]:
        if tile:
            below, right = -height % tile[0], -width % tile[1]
            padded = np.pad(plane, ((0, below), (0, right), (0, 0)), mode="edge")
            for y in range(0, height, tile[0]):
                row = padded[y : y + tile[0]]
                pieces += [row[:, x : x + tile[1]] for x in range(0, width, tile[1])]
        else:
            step = rows_per_strip or height
            pieces += [plane[y : y + step] for y in range(0, height, step)]
    data = []
    for piece in pieces:
        stored = compress(row_bytes(np.ascontiguousarray(piece), bits, order, predictor).tobytes())
        data.append(stored.translate(REVERSED) if fill_order == 2 else stored)
    given = {
        256: width,
        257: height,
        258: [bits] * n,
        259: compression,
        262: photometric,
        277: n,
        284: 2 if planar else 1,
        317: predictor,
        339: [3 if samples.dtype.kind == "f" else 1] * n,
    }
    if fill_order != 1:
        given[266] = fill_order
    if tile:
        given |= {322: tile[1], 323: tile[0]}
    elif rows_per_strip:
        given[278] = rows_per_strip
    return pages([page(given | tags.pop("tags", {}), data, tiled=bool(tile))], order, big)


def page(tags, pieces, tiled=False):
    """Tags by number: an int, a list, (type, list) or bytes; None leaves a tag out."""
    return tags, pieces, tiled


def typed(value):
    """A value of a tag as its type and its numbers."""
    if isinstance(value, tuple):
        return value
    if isinstance(value, bytes):
        return 7, list(value)
    return 4 if np.max(value) > 65535 else 3, np.atleast_1d(value).tolist()


def pages(all_pages, order="<", big=False):
    """A file of pages, each as `page` makes it; its pieces lie before its tags."""
    word, long = ("Q", 16) if big else ("I", 4)
    mark = b"II" if order == "<" else b"MM"
    version = struct.pack(order + "HHH", 43, 8, 0) if big else struct.pack(order + "H", 42)
    out = bytearray(mark + version)
    link = len(out)
    out += struct.pack(order + word, 0)
    for given, pieces, tiled in all_pages:
        offsets = []
        for piece in pieces:
            offsets.append(len(out))
            out += piece
        places = (324, 325) if tiled else (273, 279)
        tags = {places[0]: (long, offsets), places[1]: (long, [len(p) for p in pieces])} | given
        tags = {tag: value for tag, value in sorted(tags.items()) if value is not None}
        entries = b""
        for tag, value in tags.items():
            kind, numbers = typed(value)
            field = b"".join(
                struct.pack(order + SIZES[kind], *np.atleast_1d(x).tolist()) for x in numbers
            )
            room = struct.calcsize(order + word)
            if len(field) > room:
                out += bytes(len(out) % 2)
                at = len(out)
                out += field
                field = struct.pack(order + word, at)
            entries += struct.pack(order + "HH" + word, tag, kind, len(numbers))
            entries += field.ljust(room, b"\0")
        out += bytes(len(out) % 2)
        struct.pack_into(order + word, out, link, len(out))
        out += struct.pack(order + ("Q" if big else "H"), len(tags)) + entries
        link = len(out)
        out += struct.pack(order + word, 0)
    return bytes(out)
