"""The directories of a TIFF file: one for each page, of tags and their values."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import BinaryIO

import numpy as np

from npad.images.samples import Array

__all__ = ["Directory", "Tag", "full_pages"]


class Tag(IntEnum):
    """The tags that are looked at."""

    NEW_SUBFILE_TYPE = 254
    SUBFILE_TYPE = 255
    WIDTH = 256
    HEIGHT = 257
    BITS = 258
    COMPRESSION = 259
    PHOTOMETRIC = 262
    FILL_ORDER = 266
    STRIP_OFFSETS = 273
    ORIENTATION = 274
    SAMPLES = 277
    ROWS_PER_STRIP = 278
    STRIP_BYTE_COUNTS = 279
    MAX_SAMPLE_VALUE = 281
    PLANAR = 284
    T4_OPTIONS = 292
    T6_OPTIONS = 293
    PREDICTOR = 317
    COLOR_MAP = 320
    TILE_WIDTH = 322
    TILE_HEIGHT = 323
    TILE_OFFSETS = 324
    TILE_BYTE_COUNTS = 325
    SUB_DIRECTORIES = 330
    INK_SET = 332
    EXTRA_SAMPLES = 338
    SAMPLE_FORMAT = 339
    S_MAX_SAMPLE_VALUE = 341
    INDEXED = 346
    JPEG_TABLES = 347
    YCBCR_COEFFICIENTS = 529
    YCBCR_SUBSAMPLING = 530
    REFERENCE_BLACK_WHITE = 532
    DEPTH = 32997
    LINEARIZATION_TABLE = 50712
    BLACK_LEVEL = 50714
    WHITE_LEVEL = 50717


TYPES = {1: "u1", 2: "u1", 3: "u2", 4: "u4", 5: "u4", 6: "i1", 7: "u1", 8: "i2", 9: "i4"}
TYPES |= {10: "i4", 11: "f4", 12: "f8", 13: "u4", 16: "u8", 17: "i8", 18: "u8"}
RATIONAL = (5, 10)  # two numbers each
MULTI_PAGE = 2  # the bit of NewSubfileType that does not make a page part of another


@dataclass(frozen=True)
class Directory:
    """One page. Values of tags are read when they are asked for.

    Attributes
    ----------
    file : the open file
    size : its bytes
    order : "<" or ">", the order of bytes in all numbers of the file
    entries : of each tag, its type, the number of its values, and these or where they are
    """

    file: BinaryIO
    size: int
    order: str
    entries: dict[int, tuple[int, int, bytes]]

    def __contains__(self, tag: Tag) -> bool:
        return tag in self.entries

    def count(self, tag: Tag) -> int:
        """The number of values of a tag."""
        return self.entries[tag][1] if tag in self.entries else 0

    def values(self, tag: Tag, default: tuple[float, ...] = (), limit: int | None = None) -> Array:
        """All values of a tag, or the first `limit` of them.

        Raises
        ------
        ValueError
            They do not lie in the file, or are no numbers.
        """
        if tag not in self.entries:
            return np.asarray(default)
        kind, count, field = self.entries[tag]
        if kind not in TYPES:
            raise ValueError(f"tag {tag} is of the unknown type {kind}")
        dtype = np.dtype(self.order + TYPES[kind])
        each = dtype.itemsize * (2 if kind in RATIONAL else 1)
        if count * each > len(field):
            offset = int.from_bytes(field, "little" if self.order == "<" else "big")
            if offset + count * each > self.size:
                raise ValueError(f"the values of tag {tag} lie outside of the file")
            self.file.seek(offset)
            field = self.file.read(each * (count if limit is None else min(count, limit)))
        values = np.frombuffer(field[: count * each], dtype)[:limit]
        if kind in RATIONAL:
            values = values.reshape(-1, 2).astype(np.float64)
            with np.errstate(divide="ignore", invalid="ignore"):
                values = values[:, 0] / values[:, 1]
        return values.astype(dtype.newbyteorder("="), copy=False)

    def value(self, tag: Tag, default: int) -> int:
        """The first value of a tag."""
        values = self.values(tag, (default,), limit=1)
        return int(values[0]) if values.size else default

    @property
    def is_full(self) -> bool:
        """Whether the page is a picture of its own: no thumbnail, reduced copy or mask."""
        if Tag.NEW_SUBFILE_TYPE in self:
            return self.value(Tag.NEW_SUBFILE_TYPE, 0) & ~MULTI_PAGE == 0
        return self.value(Tag.SUBFILE_TYPE, 1) != 2


def full_pages(file: BinaryIO) -> list[Directory]:
    """The pages that are pictures of their own; the only page is one, whatever it is marked as.

    In raw files the first page is a thumbnail, and the picture belongs to it.

    Raises
    ------
    ValueError
        The first page is damaged, or there is none.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    header = file.read(16)
    order = {b"II": "<", b"MM": ">"}[header[:2]]
    (version,) = struct.unpack_from(order + "H", header, 2)
    if version not in (42, 43):
        raise ValueError(f"version {version} of TIFF is unknown")
    big = version == 43
    (start,) = struct.unpack_from(order + ("8xQ" if big else "4xI"), header)
    chain = _Chain(file, size, order, big)
    pages = list(chain.follow(start))
    full = [page for page in pages if page.is_full]
    if not full:
        # Only Orientation is said of both, and by the first page alone.
        inherited = {t: v for t, v in pages[0].entries.items() if t == Tag.ORIENTATION}
        for offset in pages[0].values(Tag.SUB_DIRECTORIES).tolist():
            page = next(chain.follow(offset))
            if page.is_full:
                full.append(Directory(file, size, order, inherited | page.entries))
    return full or (pages if len(pages) == 1 else [])


class _Chain:
    """Follows directories. Those of a sound file do not overlap: together they fit into it."""

    def __init__(self, file: BinaryIO, size: int, order: str, big: bool) -> None:
        self.file, self.size, self.order = file, size, order
        self.left = size
        # How a directory stores its length, an entry, and where the next one is.
        self.length, self.entry, self.next = ("Q", "HHQ8s", "Q") if big else ("H", "HHI4s", "I")

    def follow(self, offset: int) -> Iterator[Directory]:
        """A page and those behind it, as far as they can be read."""
        seen: set[int] = set()
        while offset and offset not in seen:
            seen.add(offset)
            try:
                page, offset = self._read(offset)
            except (ValueError, struct.error):
                if len(seen) == 1:
                    raise
                return
            yield page
        if not seen:
            raise ValueError("the file holds no page")

    def _read(self, offset: int) -> tuple[Directory, int]:
        if offset >= self.size:
            raise ValueError("a page lies outside of the file")
        self.file.seek(offset)
        (n,) = self._numbers(self.length)
        entry = struct.Struct(self.order + self.entry)
        n_bytes = n * entry.size
        self.left -= n_bytes
        if n == 0 or self.left < 0 or self.file.tell() + n_bytes > self.size:
            raise ValueError("the tags of a page do not fit into the file")
        entries: dict[int, tuple[int, int, bytes]] = {}
        for tag, kind, count, field in entry.iter_unpack(self.file.read(n_bytes)):
            entries.setdefault(tag, (kind, count, field))
        try:
            (following,) = self._numbers(self.next)
        except struct.error:  # the file ends here
            following = 0
        return Directory(self.file, self.size, self.order, entries), following

    def _numbers(self, form: str) -> tuple[int, ...]:
        numbers = struct.Struct(self.order + form)
        return numbers.unpack(self.file.read(numbers.size))
