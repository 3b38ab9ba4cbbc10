"""PBM, PGM and PPM, which carry the name PNM together."""

from __future__ import annotations

import re
from functools import partial
from typing import BinaryIO, NamedTuple

import numpy as np

from npad.images.samples import Array, Reading, Samples
from npad.images.stored import Stored

__all__ = ["read_pnm"]

NUMBER = rb"(?:\s|#[^\r\n]*[\r\n])+(\d{1,9})"  # a comment may stand before any number
HEADER = re.compile(
    rb"P(?:([14])|([2356]))" + NUMBER + NUMBER + rb"(?(2)" + NUMBER + rb"|)(?:\r\n|\s)"
)
COMMENT = re.compile(rb"#[^\r\n]*")
DIGITS, SPACES = b"0123456789", b" \t\r\n\v\f"
MAX_HEADER = 1 << 16


class _Header(NamedTuple):
    kind: int  # of bits, grey, colour: 1 to 3 as text, 4 to 6 as bytes
    shape: tuple[int, ...]
    maxval: int
    start: int  # of the pixels

    @property
    def is_text(self) -> bool:
        return self.kind <= 3

    @property
    def dtype(self) -> np.dtype[np.generic]:
        return np.dtype(">u2" if self.maxval > 255 else np.uint8)

    @property
    def row(self) -> int:
        """Values in a row of bytes, where one holds eight bits."""
        width = self.shape[1]
        return -(-width // 8) if self.kind == 4 else width * (3 if self.kind == 6 else 1)

    @property
    def end(self) -> int:
        return self.start + self.shape[0] * self.row * self.dtype.itemsize


def read_pnm(file: BinaryIO, name: str, reading: Reading) -> Stored:
    """Read a PNM; of several images in a file the first.

    White is maxval. But 65535 says nothing: it is written whatever the camera fills.
    """
    header = _header(file, 0)
    if header is None or not 0 < header.maxval < 65536 or 0 in header.shape:
        raise ValueError("its header cannot be read")
    n_pages, last = 1, header
    while not header.is_text and (following := _header(file, last.end)):
        n_pages, last = n_pages + 1, following
    height, width = header.shape[:2]
    return Stored((height, width), partial(_decode, file, header), n_pages=n_pages)


def _decode(file: BinaryIO, header: _Header) -> Samples:
    file.seek(header.start)
    values = _from_text(file.read(), header) if header.is_text else _from_bytes(file, header)
    if header.kind in (1, 4):
        return Samples(np.where(values, np.uint8(0), np.uint8(255)))  # 1 is black
    if header.maxval == 255 and values.max() <= 255:
        return Samples(values.astype(np.uint8, copy=False))
    values = values if values.dtype.type is np.uint16 else values.astype(np.uint16)
    return Samples(values, None if header.maxval == 65535 else header.maxval)


def _header(file: BinaryIO, at: int) -> _Header | None:
    """The header there."""
    file.seek(at)
    found = HEADER.match(file.read(MAX_HEADER))
    if found is None:
        return None
    kind = int(found[1] or found[2])
    width, height = int(found[3]), int(found[4])
    shape = (height, width, 3) if kind in (3, 6) else (height, width)
    return _Header(kind, shape, int(found[5] or 1), at + found.end())


def _from_bytes(file: BinaryIO, header: _Header) -> Array:
    height, width = header.shape[:2]
    n = height * header.row
    values = np.frombuffer(file.read(n * header.dtype.itemsize), header.dtype, n)
    if header.kind == 4:
        return np.unpackbits(values.reshape(height, -1), axis=1, count=width)
    return values.reshape(header.shape)


def _from_text(text: bytes, header: _Header) -> Array:
    text = COMMENT.sub(b"", text)
    if text.translate(None, SPACES + (b"01" if header.kind == 1 else DIGITS)):
        raise ValueError("there is more than numbers in it")
    n = int(np.prod(header.shape))
    if header.kind == 1:  # its digits may stand side by side
        values: Array = np.frombuffer(text.translate(None, SPACES), np.uint8) - np.uint8(ord("0"))
    else:
        values = np.fromstring(text.decode(), np.int64, sep=" ")
        if values[:n].max(initial=0) > 65535:
            raise ValueError("a value is above 65535")
    if len(values) < n:
        raise ValueError("not enough image data")
    return values[:n].reshape(header.shape)
