"""PBM, PGM and PPM, which carry the name PNM together."""

from __future__ import annotations

import re
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from npad.images.pillow import decode_raw, read_array
from npad.images.samples import Array, Reading, Samples, check_size

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


def read_pnm(file: BinaryIO, name: str, reading: Reading) -> Samples:
    """Read a PNM; of several images in a file the first.

    White is maxval. But 65535 says nothing: it is written whatever the camera fills.
    """
    header = _header(file, 0)
    if header is None or not 0 < header.maxval < 65536 or 0 in header.shape:
        raise ValueError("its header cannot be read")
    height, width = header.shape[:2]
    check_size(width, height, name, reading)
    text, maxval = header.kind <= 3, header.maxval
    values: Image.Image | Array
    if text:
        values = _from_text(file.read(), header)
    elif maxval == 255:
        mode = "RGB" if header.kind == 6 else "L"
        values = decode_raw(mode, (width, height), file, mode, header.row)
    else:
        values = _from_bytes(file, header)
    n_pages, last = 1, header
    while not text and (following := _header(file, last.end)):
        n_pages, last = n_pages + 1, following
    if isinstance(values, Image.Image):
        return Samples(values, n_pages=n_pages)
    if header.kind in (1, 4):
        return Samples(np.where(values, np.uint8(0), np.uint8(255)), n_pages=n_pages)  # 1 is black
    if maxval == 255 and values.max() <= 255:
        return Samples(values.astype(np.uint8))
    values = values if values.dtype.type is np.uint16 else values.astype(np.uint16)
    return Samples(values, None if maxval == 65535 else maxval, n_pages)


def _header(file: BinaryIO, at: int) -> _Header | None:
    """The header there, with the file at its end."""
    file.seek(at)
    found = HEADER.match(file.read(MAX_HEADER))
    if found is None:
        return None
    file.seek(at + found.end())
    kind = int(found[1] or found[2])
    width, height = int(found[3]), int(found[4])
    shape = (height, width, 3) if kind in (3, 6) else (height, width)
    return _Header(kind, shape, int(found[5] or 1), at + found.end())


def _from_bytes(file: BinaryIO, header: _Header) -> Array:
    height, width = header.shape[:2]
    rows = read_array(file, (height, header.row), header.dtype)
    if header.kind == 4:
        return np.unpackbits(rows, axis=1, count=width)
    return rows.reshape(header.shape)


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
