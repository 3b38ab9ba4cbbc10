"""What brings samples to [0, 1] and to a size, a band of rows at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TypeAlias

import numpy as np
from PIL import Image

from npad.images.errors import ImageError
from npad.images.pillow import BAND, ORDINARY
from npad.images.rows import rows_of
from npad.images.samples import Array, Reading, Samples

__all__ = ["as_pixels", "is_constant", "resized", "size_of", "white_level"]

BILINEAR = Image.Resampling.BILINEAR
Box: TypeAlias = "tuple[float, float, float, float]"
# Interpolation in float32 leaves [0, 1] by a rounding error; a wrong scale leaves it by far more.
ROUNDING = 1e-5
VISIBLE = 1e-3  # of differences: one below may be due to rounding


def white_level(samples: Samples, name: str, reading: Reading) -> tuple[int, int | None]:
    """The value that becomes 1, and the largest one of 16 bits whose white the file does not say.

    Raises
    ------
    ImageError
        A value lies above white; or one of floating point outside [0, 1].
    """
    values = samples.values
    if isinstance(values, Image.Image):
        if values.mode != "I;16":
            return 255, None
    elif values.dtype == np.uint8:
        return 255, None
    elif values.dtype.type is not np.uint16:
        _check_range(values, name)
        return 1, None
    largest = max(int(rows.max()) for _, rows in _pieces(values))
    white = samples.white or 2 ** (reading.bit_depth or 16) - 1
    if largest <= white:
        return white, largest if samples.white is None else None
    if samples.white is not None:
        reason = f"but the file says that white is {white}; save it again with what is right"
    else:
        reason = (
            f"but white is {white} at bit_depth={reading.bit_depth}; give bit_depth="
            f"{largest.bit_length()} or more, with which the model must have been fitted"
        )
    raise ImageError(name, f"a value is {largest}, {reason}")


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


def _fractions(values: Array, white: int) -> Array:
    """Values as fractions of white, in float32."""
    if values.dtype == np.uint8:
        return np.divide(values, white, dtype=np.float32)
    if values.dtype.type is np.uint16:
        return values.astype(np.float32) / np.float32(white)
    return np.clip(values.astype(np.float32), 0, 1)  # see ROUNDING


def resized(values: Image.Image | Array, white: int, size: tuple[int, int]) -> Array:
    """Grey (height, width) or RGB (3, height, width) float32 in [0, 1].

    Pillow's bilinear filter, whose support grows with the reduction: it is antialiased. Values of 8
    bits are rounded to 8 bits again. An image of this size is not interpolated.
    """
    if size_of(values) == size:
        return _channels_first(_fractions(_rows(values, 0, size[0]), white))
    if not isinstance(values, Image.Image) and values.dtype == np.uint8:
        if values.ndim == 3 and values.shape[0] * values.shape[1] > ORDINARY:
            # Pillow stores a colour in four bytes: a second image, and larger than the first.
            return np.stack([resized(values[:, :, c], white, size) for c in range(3)])
        values = Image.fromarray(np.ascontiguousarray(values))
    if isinstance(values, Image.Image) and values.mode != "I;16":
        small = values.resize(size[::-1], BILINEAR)
        return _channels_first(_fractions(np.asarray(small), white))
    channels = () if isinstance(values, Image.Image) else values.shape[2:]
    out = np.empty((*channels, *size), np.float32)
    for rows, band, box in _bands(values, size[0]):
        fractions = _channels_first(_fractions(band, white)).reshape(-1, *band.shape[:2])
        for plane, target in zip(fractions, out.reshape(-1, *size), strict=True):
            whole = Image.fromarray(plane)
            target[rows] = whole.resize((size[1], rows.stop - rows.start), BILINEAR, box)
    return np.clip(out, 0, 1, out=out)  # see ROUNDING


def size_of(values: Image.Image | Array) -> tuple[int, int]:
    """Height and width."""
    height, width = values.size[::-1] if isinstance(values, Image.Image) else values.shape[:2]
    return height, width


def _rows(values: Image.Image | Array, first: int, last: int) -> Array:
    if not isinstance(values, Image.Image):
        return values[first:last]
    whole = last - first == values.height
    return np.asarray(values if whole else rows_of(values, first, last))


def _band(values: Image.Image | Array) -> int:
    """Rows that are converted at once."""
    height, width = size_of(values)
    return height if height * width <= ORDINARY else max(1, BAND // width)


def _pieces(values: Image.Image | Array) -> Iterator[tuple[slice, Array]]:
    height, step = size_of(values)[0], _band(values)
    for first in range(0, height, step):
        last = min(first + step, height)
        yield slice(first, last), _rows(values, first, last)


def _bands(values: Image.Image | Array, height: int) -> Iterator[tuple[slice, Array, Box]]:
    """Rows of the result, those of the image that they are made of, and where in these they lie."""
    n_rows, n_columns = size_of(values)
    scale = n_rows / height
    reach = max(scale, 1.0)  # of the filter, from the middle of a row of the result
    step = max(1, round(_band(values) / scale))
    for start in range(0, height, step):
        stop = min(start + step, height)
        first = max(0, math.floor(start * scale - reach))
        last = min(n_rows, math.ceil(stop * scale + reach))
        box = (0, start * scale - first, n_columns, min(stop * scale, n_rows) - first)
        yield slice(start, stop), _rows(values, first, last), box


def _channels_first(values: Array) -> Array:
    return values if values.ndim == 2 else np.moveaxis(values, 2, 0)


def as_pixels(values: Image.Image | Array, white: int) -> Array:
    """RGB (H, W, 3) of its own memory: uint8, or float32 in [0, 1]."""
    out = None
    for place, rows in _pieces(values):
        piece = rows if rows.dtype == np.uint8 else _fractions(rows, white)
        if out is None:
            out = np.empty((*size_of(values), 3), piece.dtype)
        out[place] = piece if piece.ndim == 3 else piece[:, :, None]
    assert out is not None
    return out


def is_constant(values: Image.Image | Array, small: Array) -> bool:
    """Whether all pixels are equal; nearly any image shows in a row of what it was resized to.

    Parameters
    ----------
    values : the image
    small : (3, height, width), the image resized
    """
    for part in (small[:, 0], small):
        if (np.abs(part - small[:, 0, 0].reshape(3, *[1] * (part.ndim - 1))) > VISIBLE).any():
            return False
    if isinstance(values, Image.Image):
        extrema = np.reshape(values.getextrema(), (-1, 2))
        return bool((extrema[:, 0] == extrema[:, 1]).all())
    return bool((values.min((0, 1)) == values.max((0, 1))).all())
