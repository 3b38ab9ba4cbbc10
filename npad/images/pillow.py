"""Images of Pillow's: those that a program passes, and what a reader gets out of them."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
from PIL import Image, TiffImagePlugin

from npad.images.errors import ImageError
from npad.images.orientation import TAG, exif_orientation, upright
from npad.images.samples import Array, Reading, Samples, check_size

__all__ = ["read_pillow", "to_array"]

# What each mode becomes, step by step. Alpha is dropped: an inspection image is what the camera saw.
MODES = {"1": "L", "LA": "L", "La": "LA", "P": "RGB", "PA": "RGB", "RGBA": "RGB", "RGBa": "RGBA"}
MODES |= {"RGBX": "RGB", "CMYK": "RGB", "YCbCr": "RGB"}
BAND = 1 << 22  # pixels


def read_pillow(image: Image.Image, name: str, reading: Reading) -> Samples:
    """Take an image in memory: its mode says what its values are, its EXIF how it is turned."""
    check_size(image.width, image.height, name, reading)
    _load(image)
    n_pages = getattr(image, "n_frames", 1)
    orientation = _orientation(image)
    while image.mode in MODES:
        image = image.convert(MODES[image.mode])
    values: Image.Image | Array = image
    if image.mode.startswith("I;16"):
        values = to_array(image).astype(np.uint16, copy=False)
    elif image.mode == "F":
        values = to_array(image)
    elif image.mode not in ("L", "RGB"):
        raise ImageError(
            name,
            f'an image of mode {image.mode}: pass one of mode "L", "RGB" or "I;16", or an array of '
            "uint8, uint16, or floating point in [0, 1]",
        )
    return Samples(upright(values, orientation), n_pages=n_pages)


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


def _orientation(image: Image.Image) -> int | None:
    orientation = exif_orientation(image.info.get("exif", b""))  # other tags may be damaged
    with suppress(Exception):
        orientation = image.getexif().get(TAG)
    return orientation if orientation in range(1, 9) else None


def to_array(image: Image.Image, out: Array | None = None) -> Array:
    """The pixels of an image, copied a band at a time: NumPy makes two more copies on the way."""
    step = max(1, BAND // image.width)
    if out is None and image.height <= step:
        return np.asarray(image)
    for top in range(0, image.height, step):
        bottom = min(top + step, image.height)
        band = np.asarray(image.crop((0, top, image.width, bottom)))
        if out is None:
            out = np.empty((image.height, *band.shape[1:]), band.dtype)
        out[top:bottom] = band
    assert out is not None
    return out
