"""The strips or tiles of a TIFF page, decompressed.

Pillow's libtiff decompresses and does nothing else. To most compressions an image is bytes, so it is
given rows of bytes; whatever they mean is as it was written, down to the order of bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from itertools import accumulate

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from npad.images.rows import rows_of
from npad.images.samples import Array
from npad.images.tiff.directory import Directory, Tag
from npad.images.tiff.layout import FAX, JPEG, STORED, YCBCR, Layout

__all__ = ["Plane", "planes"]

BLOCK = 1 << 21  # bytes that are handed out at once, and decompressed where strips are no larger
REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
# Bytes that come at most of one: what claims more takes no memory.
EXPANSION = {5: 4096, 8: 1032, 32773: 64, 32946: 1032}
# A photometric interpretation in which libtiff leaves so many samples as they are.
AS_THEY_ARE = {1: 1, 3: 2, 4: 5}


def planes(page: Directory, layout: Layout) -> list[Plane]:
    """The planes that hold samples; one, where samples are stored side by side.

    Raises
    ------
    ValueError
        Strips or tiles are missing or do not lie in the file.
    """
    n_pieces = layout.across * layout.down
    offsets = _numbers(page, Tag.TILE_OFFSETS, Tag.STRIP_OFFSETS, layout.n_planes * n_pieces)
    stored = np.tile(layout.rows(), layout.n_planes) * layout.row_bytes
    if layout.compression == STORED:
        counts = stored
    elif Tag.TILE_BYTE_COUNTS in page or Tag.STRIP_BYTE_COUNTS in page:
        counts = _numbers(page, Tag.TILE_BYTE_COUNTS, Tag.STRIP_BYTE_COUNTS, len(offsets))
    elif len(offsets) == 1:
        counts = page.size - offsets
    else:
        raise ValueError("it does not say how large its strips or tiles are")
    if counts.min() < 1 or offsets.min() < 8:
        raise ValueError("a strip or tile is missing")
    if (offsets + counts).max() > page.size or counts.sum() > page.size:
        raise ValueError("its strips or tiles do not fit into the file")
    if (counts * EXPANSION.get(layout.compression, np.inf) < stored).any():
        raise ValueError("its strips or tiles are too short for the size of the image")
    return [
        Plane(page, layout, offsets[start : start + n_pieces], counts[start : start + n_pieces])
        for start in range(0, len(offsets), n_pieces)
    ]


def _numbers(page: Directory, of_tiles: Tag, of_strips: Tag, n: int) -> Array:
    tag = of_tiles if of_tiles in page else of_strips
    if page.count(tag) != n:
        raise ValueError(f"it lists {page.count(tag)} strips or tiles and needs {n}")
    values = page.values(tag)
    if values.max() > page.size:
        raise ValueError("its strips or tiles do not fit into the file")
    return values.astype(np.int64)


@dataclass(frozen=True, eq=False)
class Plane:
    """Strips or tiles that together hold each pixel once.

    Attributes
    ----------
    page, layout : of the image
    offsets, counts : where each piece lies, and its bytes as they are stored
    """

    page: Directory
    layout: Layout
    offsets: Array
    counts: Array

    def blocks(self) -> Iterator[tuple[int, int, Array]]:
        """Some rows at a time of a piece: their x and y, and (rows, bytes) uint8.

        Raises
        ------
        OSError
            They cannot be decompressed.
        """
        layout, n = self.layout, len(self.offsets)
        step = max(1, BLOCK // layout.row_bytes)
        at_once = max(1, BLOCK // (layout.row_bytes * layout.piece_height))
        for first in range(0, n, at_once):
            pieces = range(first, min(first + at_once, n))
            image = None if layout.compression == STORED else self._decompress(pieces)
            for piece in pieces:
                x = piece % layout.across * layout.piece_width
                y = piece // layout.across * layout.piece_height
                height = min(layout.piece_height, layout.height - y)
                for row in range(0, height, step):
                    n_rows = min(step, height - row)
                    if image is None:
                        n_bytes = n_rows * layout.row_bytes
                        data = self._read(
                            int(self.offsets[piece]) + row * layout.row_bytes, n_bytes
                        )
                    else:
                        top = (piece - first) * layout.piece_height + row
                        data = rows_of(image, top, top + n_rows).tobytes()
                    yield x, y + row, np.frombuffer(data, np.uint8).reshape(n_rows, -1)

    def _read(self, offset: int, n_bytes: int) -> bytes:
        """Bytes of the file, the first bit of each as its highest."""
        self.page.file.seek(offset)
        data = self.page.file.read(n_bytes)
        if self.layout.compression == JPEG or self.page.value(Tag.FILL_ORDER, 1) != 2:
            return data
        return data.translate(REVERSED)

    def _decompress(self, pieces: range) -> Image.Image:
        """Pieces one below the other, as strips of a TIFF file made for libtiff."""
        layout, page = self.layout, self.page
        width, bits, photometric, n_samples = layout.row_bytes, 8, 1, 1
        if layout.compression in FAX:
            width, bits = layout.piece_width, 1
        elif layout.compression == JPEG:
            width, n_samples = layout.piece_width, layout.n_together
            photometric = AS_THEY_ARE[n_samples]
            if layout.photometric == YCBCR:
                photometric = YCBCR  # libtiff makes RGB of it
        height = len(pieces) * layout.piece_height
        if not layout.tiled:  # the last strip ends with the image
            height = min(height, layout.height - pieces.start * layout.piece_height)
        offsets, counts = self.offsets[pieces].tolist(), self.counts[pieces].tolist()
        strips = [self._read(*where) for where in zip(offsets, counts, strict=True)]
        tags: dict[int, list[int] | bytes] = {
            Tag.WIDTH: [width],
            Tag.HEIGHT: [height],
            Tag.BITS: [bits] * n_samples,
            Tag.COMPRESSION: [layout.compression],
            Tag.PHOTOMETRIC: [photometric],
            Tag.SAMPLES: [n_samples],
            Tag.ROWS_PER_STRIP: [layout.piece_height],
            Tag.STRIP_BYTE_COUNTS: counts,
        }
        for tag in (Tag.T4_OPTIONS, Tag.T6_OPTIONS):
            if tag in page:
                tags[tag] = [page.value(tag, 0)]
        if Tag.JPEG_TABLES in page:
            tags[Tag.JPEG_TABLES] = page.values(Tag.JPEG_TABLES).tobytes()
        with _tiff_file(tags, strips) as file:
            del strips
            image = TiffImageFile(file)
            # Else Pillow doubts large sizes by a limit of the process.
            image.im = Image.new(image.mode, image.size, None).im
            image.load()
        return image


def _tiff_file(tags: dict[int, list[int] | bytes], strips: list[bytes]) -> BytesIO:
    """A file of one page: the strips, the tags, and values that a tag has no room for."""
    *offsets, start = accumulate((len(strip) for strip in strips), initial=8)
    tags = tags | {Tag.STRIP_OFFSETS: offsets}
    behind = start + 2 + 12 * len(tags) + 4
    entries = values = b""
    for tag, value in sorted(tags.items()):
        field = value if isinstance(value, bytes) else struct.pack(f"<{len(value)}I", *value)
        entries += struct.pack("<HHI", tag, 7 if isinstance(value, bytes) else 4, len(value))
        if len(field) <= 4:
            entries += field.ljust(4, b"\0")
        else:
            entries += struct.pack("<I", behind + len(values))
            values += field
    head = b"II*\0" + struct.pack("<I", start)
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    return BytesIO(b"".join([head, *strips, directory, values]))
