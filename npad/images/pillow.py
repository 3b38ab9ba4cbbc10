"""Images of Pillow's: those that a program passes, and what a reader gets out of them."""

from __future__ import annotations

from contextlib import suppress
from typing import cast

import numpy as np
from PIL import Image, TiffImagePlugin

from npad.images.errors import ImageError
from npad.images.orientation import TAG, TURNS_AXES, exif_orientation, upright
from npad.images.samples import Array, Reading, Samples, check_size

__all__ = ["look_up", "pillow_size", "read_pillow", "rows_of", "to_array"]

# What each mode becomes, step by step. Alpha is dropped: an inspection image is what the camera saw.
MODES = {"1": "L", "LA": "L", "La": "LA", "P": "RGB", "PA": "RGB", "RGBA": "RGB", "RGBa": "RGBA"}
MODES |= {"RGBX": "RGB", "CMYK": "RGB", "YCbCr": "RGB"}
ORDINARY = 1 << 24  # pixels of an image that is converted in one piece
BAND = 1 << 21  # pixels of a piece of a larger one


def read_pillow(image: Image.Image, name: str, reading: Reading) -> Samples:
    """Take an image in memory: its mode says what its values are, its EXIF how it is turned."""
    check_size(image.width, image.height, name, reading)
    n_pages = 1
    if image.tell() == 0:  # else the program has chosen a page
        with suppress(Exception):
            n_pages = getattr(image, "n_frames", 1)
    _load(image)
    orientation = _orientation(image)
    while image.mode in MODES:
        image = image.convert(MODES[image.mode])
    values: Image.Image | Array = image
    if image.mode.startswith("I;16"):
        values = image if image.mode == "I;16" else to_array(image)
    elif image.mode == "F":
        values = to_array(image)
    elif image.mode not in ("L", "RGB"):
        raise ImageError(
            name,
            f'an image of mode {image.mode}: pass one of mode "L", "RGB" or "I;16", or an array of '
            "uint8, uint16, or floating point in [0, 1]",
        )
    return Samples(upright(values, orientation), n_pages=n_pages)


def pillow_size(image: Image.Image) -> tuple[int, int]:
    """(height, width) of an image in memory once it is turned; its pixels are not decoded."""
    turned = _orientation(image) in TURNS_AXES
    return (image.width, image.height) if turned else (image.height, image.width)


def _load(image: Image.Image) -> None:
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        image.load()
        return
    # A TIFF that is opened by its path is mapped into memory, with the sides of a turned image swapped.
    path, image.filename = image.filename, ""
    try:
        image.load()
    finally:
        image.filename = path


def _orientation(image: Image.Image) -> int:
    orientation = exif_orientation(image.info.get("exif", b""))  # other tags may be damaged
    with suppress(Exception):
        orientation = image.getexif().get(TAG)
    return orientation if orientation is not None and orientation in range(1, 9) else 1


def look_up(indices: Image.Image, palette: bytes, entry: str, name: str) -> Image.Image:
    """The greys or colours that a palette has for the pixels of an image of mode P.

    Parameters
    ----------
    palette : bytes of its colours
    entry : how one colour is stored, such as "RGB"
    name : of the file
    """
    n = min(256, len(palette) // len(entry))
    if cast("tuple[int, int]", indices.getextrema())[1] >= n:
        raise ImageError(name, "damaged: a pixel's colour is not in the palette; replace it")
    palette = palette[: n * len(entry)]
    colours = np.frombuffer(palette, np.uint8).reshape(n, -1)[:, :3]
    indices.putpalette(palette, entry)
    return indices.convert("L" if (colours == colours[:, :1]).all() else "RGB")


def to_array(image: Image.Image, out: Array | None = None) -> Array:
    """The pixels of an image, copied a band at a time: NumPy makes two more copies on the way."""
    if out is None and image.width * image.height <= ORDINARY:
        return np.asarray(image)
    step = max(1, BAND // image.width)
    for top in range(0, image.height, step):
        bottom = min(top + step, image.height)
        band = np.asarray(rows_of(image, top, bottom))
        if out is None:
            out = np.empty((image.height, *band.shape[1:]), band.dtype)
        out[top:bottom] = band
    assert out is not None
    return out


def rows_of(image: Image.Image, first: int, last: int) -> Image.Image:
    """A copy of some rows. Pillow's ``crop`` asks the process's limit of pixels whether it may be."""
    part = Image.new(image.mode, (image.width, last - first), None)
    part.paste(image, (0, -first))
    return part
