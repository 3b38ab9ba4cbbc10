"""One image: read from its file, checked, resized and scaled to [0, 1]."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from npad.images.errors import ImageError
from npad.images.quiet import quiet_pillow
from npad.images.samples import AS_IT_SAYS, Array, Reading, StrPath

__all__ = ["Loaded", "load", "read_image"]

FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")
DTYPES = (np.uint8, np.uint16, np.float16, np.float32, np.float64)
# What each mode of Pillow becomes. Alpha is dropped: an inspection image is what the camera saw.
MODES = {"1": "L", "L": "L", "LA": "L", "P": "RGB", "PA": "RGB", "RGB": "RGB", "RGBA": "RGB"}
MODES |= {"RGBX": "RGB", "CMYK": "RGB", "YCbCr": "RGB", "F": "F"}
# Interpolation in float32 leaves [0, 1] by a rounding error; a wrong scale leaves it by far more.
ROUNDING = 1e-5


def read_image(path: StrPath, reading: Reading = AS_IT_SAYS) -> Array:
    """Read one image as RGB, turned as its EXIF orientation says.

    PNG, JPEG, BMP, TIFF or WebP, told by content and not by suffix; of several frames the first.
    Grey becomes three equal channels, palettes and CMYK become RGB, alpha is dropped. 16-bit grey
    is divided by 65535; floating-point TIFF must lie in [0, 1] already. Pillow reads 16-bit colour
    at 8 bits.

    Parameters
    ----------
    path : path of the file
    reading : what the file may not say of itself

    Returns
    -------
    (H, W, 3) uint8, or float32 in [0, 1] for 16-bit grey and floating-point files

    Raises
    ------
    ImageError
        Whatever is wrong with the file: missing, not an image, cut short, damaged, too large.
    """
    return _pixels([_decode(path, reading)])


@dataclass(frozen=True, eq=False)
class Loaded:
    """An image in the form that the backbone takes.

    Attributes
    ----------
    tensor : (3, height, width) float32
        RGB in [0, 1].
    size : (height, width)
        The size before resizing.
    pixels : (H, W, 3) uint8, or float32 in [0, 1]
        The image before resizing, as `read_image` gives it; None where it is not kept.
    constant : bool
        Every pixel is equal.
    undeclared : int or None
        Its largest value, where values have 16 bits and the file does not say how many of them the
        camera fills.
    n_pages : int
        Pages of its file, of which the first is read.
    """

    tensor: Tensor
    size: tuple[int, int]
    pixels: Array | None
    constant: bool = False
    undeclared: int | None = None
    n_pages: int = 1


def load(
    image: StrPath | Array,
    name: str,
    image_size: tuple[int, int],
    reading: Reading = AS_IT_SAYS,
    *,
    keep_pixels: bool = False,
) -> Loaded:
    """Bring one image to the form that the backbone takes.

    Parameters
    ----------
    image : path of a file, or (H, W, C) of one of `DTYPES` with 1, 3 or 4 channels
    name : how an error calls the image
    image_size : (height, width)
        The result's size: bilinear with antialiasing. An image of this size is not interpolated.
    reading : what the image may not say of itself
    keep_pixels : whether the image as it was decoded is part of the result

    Raises
    ------
    ImageError
        As `read_image`; or an array with NaN, Inf or values outside [0, 1].
    """
    planes: list[Image.Image] | list[Array]
    if isinstance(image, np.ndarray):
        planes = _planes(image, name, reading)
        size = (image.shape[0], image.shape[1])
    else:
        planes = [_decode(image, reading)]
        size = (planes[0].height, planes[0].width)
    scaled = [_scale(_resize(plane, image_size)) for plane in planes]
    out = np.empty((3, *image_size), np.float32)
    out[:] = scaled if scaled[0].ndim == 2 else np.moveaxis(scaled[0], 2, 0)  # grey is broadcast
    return Loaded(torch.from_numpy(out), size, _pixels(planes) if keep_pixels else None)


def _pixels(planes: Sequence[Image.Image | Array]) -> Array:
    """One array of RGB or grey, or a plane for each channel, as (H, W, 3) of its own memory."""
    arrays = [np.asarray(plane) for plane in planes]
    if arrays[0].ndim == 3:
        return np.array(arrays[0])
    return np.stack(arrays * 3 if len(arrays) == 1 else arrays, axis=2)


def _decode(path: StrPath, reading: Reading) -> Image.Image:
    """The file in Pillow's mode L, RGB or F (in [0, 1])."""
    try:
        with quiet_pillow(), Image.open(path, formats=FORMATS) as image:
            image.load()
            return _convert(image, path)
    except ImageError:
        raise
    except Exception as error:  # decoders raise anything at all on damaged bytes
        raise ImageError(path, _reason(error)) from error


def _reason(error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombError):
        return (
            f"more than {2 * (Image.MAX_IMAGE_PIXELS or 0)} pixels, which may be a decompression "
            "bomb; if the file can be trusted, raise PIL.Image.MAX_IMAGE_PIXELS"
        )
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read: {error.strerror}"
    if isinstance(error, UnidentifiedImageError):
        return (
            "not a PNG, JPEG, BMP, TIFF or WebP image, or empty or cut short; remove or replace it"
        )
    if isinstance(error, MemoryError):
        return "damaged, or too large for the memory; remove or replace it"
    return f"damaged or cut short ({error or type(error).__name__}); remove or replace it"


def _convert(image: Image.Image, path: StrPath) -> Image.Image:
    with suppress(Exception):  # damaged metadata does not make the pixels unreadable
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I;16"):
        return Image.fromarray(np.asarray(image).astype(np.float32) / np.float32(65535))
    if image.mode not in MODES:
        raise ImageError(
            path, f"pixels of type {image.mode} are not supported: save as 8- or 16-bit unsigned"
        )
    if image.mode == "F":
        _check_range(np.asarray(image), os.fspath(path))
    mode = MODES[image.mode]
    return image if image.mode == mode else image.convert(mode)


def _planes(array: Array, name: str, reading: Reading) -> list[Array]:
    """(H, W, C) as what Pillow resizes: RGB or grey uint8, or one float32 plane per channel."""
    array = array[:, :, :3]
    if array.dtype == np.uint8:
        return [array if array.shape[2] == 3 else array[:, :, 0]]
    if array.dtype.type is np.uint16:
        array = array.astype(np.float32) / np.float32(65535)
    else:
        _check_range(array, name)
    return [array[:, :, c].astype(np.float32) for c in range(array.shape[2])]


def _check_range(pixels: Array, name: str) -> None:
    low, high = float(pixels.min()), float(pixels.max())  # NaN propagates
    if low >= -ROUNDING and high <= 1 + ROUNDING:
        return
    if not np.isfinite([low, high]).all():
        raise ImageError(name, "the image holds NaN or Inf: replace those pixels")
    if low < 0:
        advice = "pass the image as it is before normalisation, which is the backbone's part"
    else:
        advice = f"divide by {255 if high <= 255 else 65535 if high <= 65535 else 'its maximum'}"
    raise ImageError(
        name, f"a floating-point image must lie in [0, 1], got [{low:g}, {high:g}]: {advice}"
    )


def _resize(plane: Image.Image | Array, size: tuple[int, int]) -> Array:
    """Pillow's bilinear filter, whose support grows with the reduction: it is antialiased."""
    if isinstance(plane, np.ndarray):
        if plane.shape[:2] == size:
            return plane
        plane = Image.fromarray(plane)
    if plane.size != size[::-1]:
        plane = plane.resize(size[::-1], Image.Resampling.BILINEAR)
    return np.asarray(plane)


def _scale(pixels: Array) -> Array:
    if pixels.dtype == np.uint8:
        return np.divide(pixels, 255, dtype=np.float32)
    return np.clip(pixels, 0, 1)  # see ROUNDING
