"""A TIFF file as an image: its samples as numbers, and these as grey or RGB."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import BinaryIO

import numpy as np
from PIL import Image

from npad.images.errors import ImageError
from npad.images.orientation import xmp_orientation
from npad.images.samples import Array, Reading, Samples
from npad.images.stored import Stored
from npad.images.tiff.directory import Directory, Tag, full_pages
from npad.images.tiff.layout import (
    ALPHA,
    CMYK,
    DECOMPRESS,
    FLOAT,
    JPEG,
    OPTIONAL,
    PALETTE,
    PREMULTIPLIED,
    RGB,
    WHITE_IS_ZERO,
    YCBCR,
    Layout,
    read_layout,
)
from npad.images.tiff.pieces import planes

__all__ = ["read_tiff"]

DIFFERENCES, FLOAT_DIFFERENCES = 2, 3  # predictors
WHOLE = (1, 2, 4, 8)  # bits of which 255 is a multiple of white
# The largest value that a file states is that of the camera where it is all ones; else it is that
# of the one picture. All 16 ones are the default: they say no more than if they were missing.
CAMERAS = {2**n - 1 for n in range(8, 16)}


def read_tiff(file: BinaryIO, name: str, reading: Reading) -> Stored:
    """Read the first page of a TIFF file that is a picture of its own.

    The tags alone decide what is read. Samples come out as they are stored: integers of their
    depth, or float32. The colours of a palette have 8 bits; CMYK and YCbCr become RGB.

    Parameters
    ----------
    file : the open file
    name : how an error calls it
    reading : what it may not say of itself

    Raises
    ------
    ImageError
        The image is too large or of a kind that is not read, and how to save it instead.
    Exception
        The file is damaged or cut short.
    """
    pages = full_pages(file)
    if not pages:
        raise ImageError(
            name, "each of its pages is marked as a thumbnail or a mask: save the image alone"
        )
    page = pages[0]
    layout = read_layout(page, name, reading)
    colour = _Colour.of(page, layout, name, reading)
    turned = page.value(Tag.ORIENTATION, 0) or xmp_orientation(page.values(Tag.XMP).tobytes()) or 1
    return Stored(
        (layout.height, layout.width),
        lambda: Samples(_image(page, layout, name, colour), colour.white),
        turned if 1 <= turned <= 8 else 1,
        len(pages),
        partial(_image, page, layout, name, colour.alpha) if layout.extra == ALPHA else None,
    )


def _image(page: Directory, layout: Layout, name: str, of: Callable[[Array], Array]) -> Array:
    """The image that is made of a block of samples at a time."""
    values: Array | None = None
    try:
        for x, y, samples in _samples(page, layout):
            block = of(samples[:, : layout.width - x])
            if values is None:
                values = np.empty((layout.height, layout.width, *block.shape[2:]), block.dtype)
            values[y : y + block.shape[0], x : x + block.shape[1]] = block
    except OSError as error:
        if layout.compression not in OPTIONAL:
            raise
        lacks = f"damaged, cut short, or Pillow lacks {OPTIONAL[layout.compression]} here"
        raise ImageError(name, f"{lacks}: {DECOMPRESS}") from error
    assert values is not None  # there is a pixel
    return values


def _samples(page: Directory, layout: Layout) -> Iterator[tuple[int, int, Array]]:
    """Some rows at a time of a strip or tile: their x and y, and the numbers of each pixel."""
    for parts in zip(*(plane.blocks() for plane in planes(page, layout)), strict=True):
        x, y, _ = parts[0]
        numbers = [_numbers(rows, layout, page.order) for _, _, rows in parts]
        yield x, y, numbers[0] if len(numbers) == 1 else np.concatenate(numbers, axis=2)


def _numbers(rows: Array, layout: Layout, order: str) -> Array:
    """Rows of bytes as (rows, columns, samples) of the computer's own numbers."""
    n_rows, n, bits = len(rows), layout.n_together, layout.stored_bits
    if bits % 8:
        return _unpacked(rows, layout.piece_width * n, bits).reshape(n_rows, -1, n)
    n_bytes = bits // 8
    if layout.predictor == FLOAT_DIFFERENCES:
        # The first bytes of all numbers, their second bytes, ..., and of those the differences.
        summed = np.cumsum(rows.reshape(n_rows, -1, n), axis=1, dtype=np.uint8)
        rows = np.ascontiguousarray(summed.reshape(n_rows, n_bytes, -1).swapaxes(1, 2))
        order = ">"
    kind = "f" if layout.format == FLOAT else "u"
    numbers = rows.reshape(n_rows, -1).view(f"{order}u{n_bytes}").reshape(n_rows, -1, n)
    numbers = numbers.astype(f"=u{n_bytes}", copy=False)
    if layout.predictor == DIFFERENCES:
        numbers = np.cumsum(numbers, axis=1, dtype=numbers.dtype)
    return numbers.view(f"{kind}{n_bytes}")


def _unpacked(rows: Array, n: int, bits: int) -> Array:
    """The first `n` numbers of a few bits in each row, the highest bit first."""
    each = np.unpackbits(rows, axis=1, count=n * bits).reshape(len(rows), n, bits)
    n_bytes = (bits + 7) // 8
    padded = np.pad(each, ((0, 0), (0, 0), (8 * n_bytes - bits, 0)))
    return np.packbits(padded, axis=2).view(f">u{n_bytes}")[:, :, 0].astype(f"=u{n_bytes}")


@dataclass(frozen=True, eq=False)
class _Colour:
    """Makes grey, as two axes, or RGB of samples.

    Attributes
    ----------
    layout : of the samples
    name : of the file
    palette : (colours, 3) uint8, where there is one
    black : the integer that is black
    white : the integer that is white once black is taken away, where the file says it and it is not
        that of 8 bits
    top : the same where the file does not say it
    """

    layout: Layout
    name: str
    palette: Array | None
    black: int
    white: int | None
    top: int

    @classmethod
    def of(cls, page: Directory, layout: Layout, name: str, reading: Reading) -> _Colour:
        """By the tags of a page."""
        palette = _palette(page, layout.bits) if layout.photometric == PALETTE else None
        black, white = _black_and_white(page, layout, name)
        bits = layout.bits if layout.bits < 16 else reading.bit_depth or 16
        return cls(layout, name, palette, black, white, white or 2**bits - 1)

    def __call__(self, samples: Array) -> Array:
        """(H, W) or (H, W, 3) of (H, W, samples)."""
        layout, n = self.layout, self.layout.n_colours
        if layout.extra == PREMULTIPLIED:
            self._check_alpha(samples[:, :, n])
        samples = samples[:, :, 0] if n == 1 else samples[:, :, :n]
        if self.palette is not None:
            return self.palette[samples]
        if layout.photometric == CMYK:
            paper = 2**layout.bits - 1 - samples.astype(np.uint32)  # what ink leaves of it
            rgb = (paper[:, :, :3] * paper[:, :, 3:] + self.top // 2) // self.top
            return rgb.astype(samples.dtype)
        if layout.photometric == YCBCR and layout.compression != JPEG:
            size = (samples.shape[1], samples.shape[0])
            return np.asarray(Image.frombytes("YCbCr", size, samples.tobytes()).convert("RGB"))
        if layout.format == FLOAT:
            with np.errstate(over="ignore"):  # what is Inf then is not in [0, 1]
                return samples.astype(np.float32, copy=False)
        whole = self.white is None and layout.bits <= 8
        samples = samples.astype(np.uint8 if whole else np.uint16, copy=False)
        if self.black:
            samples = np.maximum(samples, self.black) - self.black
        if layout.photometric == WHITE_IS_ZERO:
            samples = self.top - samples
        return samples * (255 // self.top) if whole and layout.bits < 8 else samples

    @property
    def _opaque(self) -> int:
        return 1 if self.layout.format == FLOAT else 2**self.layout.bits - 1

    def alpha(self, samples: Array) -> Array:
        """Alpha of 8 bits of (H, W, samples)."""
        fractions = samples[:, :, self.layout.n_colours] / self._opaque
        return np.rint(np.nan_to_num(fractions).clip(0, 1) * 255).astype(np.uint8)

    def _check_alpha(self, alpha: Array) -> None:
        if (alpha != self._opaque).any():
            raise ImageError(
                self.name,
                "its colours are multiplied by an alpha that is not opaque: "
                "save it without alpha, or with unassociated alpha",
            )


def _palette(page: Directory, bits: int) -> Array:
    if page.count(Tag.COLOR_MAP) != 3 << bits:
        raise ValueError(f"its palette has {page.count(Tag.COLOR_MAP)} numbers, not {3 << bits}")
    colours = page.values(Tag.COLOR_MAP).reshape(3, -1).T
    return (colours >> (0 if colours.max() < 256 else 8)).astype(np.uint8)  # some write 8 bits


def _black_and_white(page: Directory, layout: Layout, name: str) -> tuple[int, int | None]:
    """What integers mean by the tags of raw files, else by their bits; see `_Colour`."""
    bits, full = layout.bits, 2**layout.bits - 1
    black, white = 0, None
    if layout.format == FLOAT or layout.photometric in (PALETTE, YCBCR):
        return 0, None
    if layout.photometric == CMYK:
        return 0, full if bits > 8 else None
    if bits == 16:
        for tag in (Tag.MAX_SAMPLE_VALUE, Tag.S_MAX_SAMPLE_VALUE):
            largest = page.values(tag).max(initial=0)
            if largest in CAMERAS:
                white = int(largest)
    elif bits not in WHOLE:
        white = full
    if layout.photometric != RGB:
        levels = page.values(Tag.BLACK_LEVEL, (0,))
        black = int(levels[0])
        if (levels != black).any() or black < 0:
            raise ImageError(name, "its black level varies (BlackLevel): develop it first")
        if Tag.WHITE_LEVEL in page:
            white = int(page.values(Tag.WHITE_LEVEL).max())
    if black:
        white = (white or full) - black
    if white is not None and white < 1:
        raise ValueError("its white level is not above its black level")
    if bits in WHOLE and (black, white) == (0, full):
        white = None
    return black, white
