"""PNG: its chunks are read here, its pixels are decoded by Pillow."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import BinaryIO, TypeAlias, cast

import numpy as np
from PIL import Image

from npad.images.errors import ImageError
from npad.images.orientation import exif_orientation, xmp_orientation
from npad.images.pillow import ORDINARY, look_up, to_array
from npad.images.samples import Array, Reading, Samples
from npad.images.stored import Stored

__all__ = ["read_png"]

GREY, RGB, PALETTE, GREY_ALPHA, RGB_ALPHA = 0, 2, 3, 4, 6  # types of colour
# Pillow's mode and how a row is stored, for 8 bits and fewer. X is alpha: it is dropped.
MODES = {
    (1, GREY): ("1", "1"),
    (2, GREY): ("L", "L;2"),
    (4, GREY): ("L", "L;4"),
    (8, GREY): ("L", "L"),
    (8, RGB): ("RGB", "RGB"),
    (1, PALETTE): ("P", "P;1"),
    (2, PALETTE): ("P", "P;2"),
    (4, PALETTE): ("P", "P;4"),
    (8, PALETTE): ("P", "P"),
    (8, GREY_ALPHA): ("LA", "LA"),
    (8, RGB_ALPHA): ("RGB", "RGBX"),
}
# Pillow keeps one byte of two in colour: the image is decoded once for each.
BYTES = {RGB: ("RGB;16L", "RGB;16B"), RGB_ALPHA: ("RGBX;16L", "RGBX;16B")}
Decoded: TypeAlias = Callable[[str, str], Image.Image]  # by a mode and how a row is stored
TEXT = (b"tEXt", b"zTXt", b"iTXt")
MAX_TEXT = 1 << 20  # bytes of a text, that a small file might claim to hold more of
EXIF_AS_TEXT = re.compile(rb"Raw profile type \w+\0\s*\w+\s+\d+\s([0-9a-fA-F\s]+)")


def read_png(file: BinaryIO, name: str, reading: Reading) -> Stored:
    """Read any PNG; of an animation, what a viewer without animations shows.

    16 bits stay 16 bits. White is what sBIT says. Of colour, gAMA, cHRM and iCCP are not applied:
    an inspection image is what the camera saw.
    """
    chunks: dict[bytes, bytes] = {}  # the first of each kind
    texts: list[bytes] = []
    pixels: list[tuple[int, int]] = []  # where they are in the file
    first_frame = 0  # of an animation: 1 where its frames begin with the pixels that are read
    for kind, start, length in _chunks(file):
        if kind == b"IDAT":
            first_frame = first_frame if pixels else int(b"fcTL" in chunks)
            pixels.append((start, length))
        elif kind in TEXT:
            texts.append(_text(kind, file.read(length)))
        elif kind != b"fdAT":
            chunks.setdefault(kind, file.read(length))
    width, height, bits, colour, *methods = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    if methods[:2] != [0, 0]:
        raise ImageError(name, "a PNG of an unknown compression: save it again")
    n_pages = 1
    if b"acTL" in chunks:
        n_pages = max(1, int.from_bytes(chunks[b"acTL"][:4], "big") + 1 - first_frame)

    def decoded(mode: str, stored: str) -> Image.Image:
        data = b"".join(_read_at(file, *where) for where in pixels)
        return Image.frombytes(mode, (width, height), data, "zip", stored, methods[2])

    def decode() -> Samples:
        values = _values(decoded, (height, width), bits, colour)
        if colour == PALETTE:
            values = look_up(cast("Image.Image", values), chunks[b"PLTE"], "RGB", name)
        elif b"sBIT" in chunks and bits >= 8:
            significant = chunks[b"sBIT"][: 3 if colour in BYTES else 1]
            return Samples(*_as_written(values, bits, significant, name))
        return Samples(values)

    def alpha() -> Array:
        return _alpha(decoded, (height, width), bits, colour, chunks.get(b"tRNS", b""))

    has_alpha = colour in (GREY_ALPHA, RGB_ALPHA) or b"tRNS" in chunks
    orientation = _orientation(chunks, texts)
    return Stored((height, width), decode, orientation, n_pages, alpha if has_alpha else None)


def _values(decoded: Decoded, size: tuple[int, int], bits: int, colour: int) -> Image.Image | Array:
    """Grey, colour, or the indices of a palette."""
    if (bits, colour) == (16, GREY):
        deep = decoded("I;16", "I;16B")
        return deep if size[0] * size[1] > ORDINARY else np.asarray(deep)
    if (bits, colour) == (16, GREY_ALPHA):
        two = to_array(decoded("RGBA", "RGBA")).view(">u2")  # two bytes of grey, two of alpha
        return two[:, :, 0].astype(np.uint16)
    if bits == 16 and colour in BYTES:
        values = np.empty((*size, 3, 2), np.uint8)
        for byte, stored in enumerate(BYTES[colour]):
            to_array(decoded("RGB", stored), values[..., byte])
        return values.view("<u2")[..., 0].astype(np.uint16, copy=False)
    image = decoded(*MODES[bits, colour])
    return image.convert("L") if image.mode in ("1", "LA") else image


def _alpha(
    decoded: Decoded, size: tuple[int, int], bits: int, colour: int, transparent: bytes
) -> Array:
    """Alpha of 8 bits, from its own channel or from what tRNS says of a value."""
    if colour == RGB_ALPHA:
        return np.asarray(decoded("RGBA", "RGBA;16B" if bits == 16 else "RGBA").getchannel("A"))
    if colour == GREY_ALPHA:
        image = decoded("RGBA", "RGBA") if bits == 16 else decoded("LA", "LA")
        return np.asarray(image.getchannel(2 if bits == 16 else 1))
    if colour == PALETTE:
        table = np.full(256, 255, np.uint8)
        table[: len(transparent)] = np.frombuffer(transparent, np.uint8)
        return table[np.asarray(decoded(*MODES[bits, colour]))]
    values = np.asarray(_values(decoded, size, bits, colour)).reshape(*size, -1)
    key = np.frombuffer(transparent, ">u2") * (255 // (2**bits - 1) if bits < 8 else 1)
    return np.where((values == key).all(axis=2), np.uint8(0), np.uint8(255))


def _chunks(file: BinaryIO) -> Iterator[tuple[bytes, int, int]]:
    """Kind, begin and length of each chunk's data, at which the file stands, as far as it goes."""
    at = 8
    while len(head := _read_at(file, at, 8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if kind in (b"IHDR", b"PLTE"):  # the pixels have a check sum of their own
            data = file.read(length)
            if file.read(4) != struct.pack(">I", zlib.crc32(data, zlib.crc32(kind))):
                raise ValueError(f"wrong check sum of {kind.decode()}")
            file.seek(at + 8)
        yield kind, at + 8, length
        if kind == b"IEND":
            return
        at += 12 + length


def _read_at(file: BinaryIO, at: int, n: int) -> bytes:
    file.seek(at)
    return file.read(n)


def _text(kind: bytes, body: bytes) -> bytes:
    """Keyword, a zero byte, and the text, inflated where it is compressed."""
    keyword, _, text = body.partition(b"\0")
    with suppress(IndexError, zlib.error):  # a damaged text does not matter
        compressed = kind == b"zTXt"
        if kind == b"iTXt":  # two flags, two names that end in zero, and the text
            compressed = text[:1] == b"\1"
            text = text[2:].split(b"\0", 2)[2]
        elif compressed:
            text = text[1:]
        if compressed:
            text = zlib.decompressobj().decompress(text, MAX_TEXT)
    return keyword + b"\0" + text


def _orientation(chunks: dict[bytes, bytes], texts: list[bytes]) -> int:
    found = [exif_orientation(chunks.get(b"eXIf", b""))]
    for text in texts:
        if profile := EXIF_AS_TEXT.match(text):
            digits = bytes(profile[1]).translate(None, b" \r\n\t")
            found.append(exif_orientation(bytes.fromhex(digits[: len(digits) // 2 * 2].decode())))
    found += [xmp_orientation(text) for text in texts if text.startswith(b"XML:com.adobe.xmp\0")]
    return next((orientation for orientation in found if orientation), 1)


def _as_written(
    values: Image.Image | Array, bits: int, significant: bytes, name: str
) -> tuple[Image.Image | Array, int | None]:
    """The values and their white, where so many bits of those stored are said to be significant.

    PNG asks a writer to spread them over all bits: the lower ones are zero, or repeat the upper ones,
    or are what is left of scaling. Cameras leave the upper ones zero. In a dark image the lower bits
    tell which it is: repeated or scaled they are then 0 or 1.
    """
    n = max(significant)
    if not 0 < n < bits:
        return values, None
    array = to_array(values) if isinstance(values, Image.Image) else values
    lower = 2 ** (bits - n) - 1
    if array.max() >= 2**n or not (array & (lower & ~1 or 1)).any():
        return values, 65535 if bits == 16 else None
    if min(significant) < n:
        raise ImageError(
            name, "the channels have different bit depths (sBIT): save it at one depth"
        )
    return array.astype(np.uint16), 2**n - 1
