"""What a file or an array holds, before it is brought to [0, 1]."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, TypeAlias

from numpy.typing import NDArray
from PIL import Image

from npad.images.errors import ImageError
from npad.settings import MAX_PIXELS

__all__ = [
    "AS_IT_SAYS",
    "Array",
    "Entry",
    "Reading",
    "Samples",
    "StrPath",
    "TooLargeError",
    "check_size",
]

StrPath: TypeAlias = "str | os.PathLike[str]"
Array: TypeAlias = NDArray[Any]
# One image: a file, the bytes of a file, an image of Pillow's, or pixels (H, W, C).
Entry: TypeAlias = "StrPath | bytes | Image.Image | Array"


@dataclass(frozen=True)
class Reading:
    """What files and arrays do not say of themselves.

    Attributes
    ----------
    bit_depth : int, optional
        Bits that the camera fills of 16, for images that do not tell: their white is
        ``2**bit_depth - 1``. None: all 16.
    max_pixels : int
        An image of more is refused before it is decoded.
    """

    bit_depth: int | None = None
    max_pixels: int = MAX_PIXELS


AS_IT_SAYS = Reading()


@dataclass(frozen=True, eq=False)
class Samples:
    """One image, upright, grey or RGB, as its format stores it.

    Attributes
    ----------
    values : Pillow image of mode L, RGB or I;16; or (H, W) or (H, W, 3) of uint8, uint16 or float32
        A grey image has two axes. Zero is black. Alpha is gone, palettes are looked up.
    white : int or None
        The value of white in uint16, where the file says it; None where it does not. Of uint8 it
        is 255 and of float32 1, and not said.
    n_pages : int
        Pages of the file, of which the first is here.
    size : (height, width), optional
        That of the image in its file, which may have been decoded at a smaller one.
    """

    values: Image.Image | Array
    white: int | None = None
    n_pages: int = 1
    size: tuple[int, int] | None = None


class TooLargeError(ImageError):
    """The image has more pixels than may be."""


def check_size(width: int, height: int, name: str, reading: Reading) -> None:
    """Refuse an image that is too large or has no pixels, before it is decoded.

    Raises
    ------
    ImageError
        It has no pixels.
    TooLargeError
        It has more than ``reading.max_pixels`` pixels.
    """
    if width < 1 or height < 1:
        raise ImageError(name, f"an image of {width} x {height} pixels; remove or replace it")
    if width * height > reading.max_pixels:
        raise TooLargeError(
            name,
            f"{width} x {height} pixels are more than {reading.max_pixels} and may be a "
            f"decompression bomb; if the file can be trusted, give max_pixels={width * height}",
        )
