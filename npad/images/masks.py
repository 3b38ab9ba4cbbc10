"""Masks: which pixels of an image show a defect."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from npad.images.decoding import opened, read_image
from npad.images.errors import ImageError
from npad.images.folders import find_images
from npad.images.orientation import upright
from npad.images.samples import Array, Reading, StrPath
from npad.images.stored import Stored
from npad.settings import MAX_PIXELS

__all__ = ["Mask", "load_mask", "read_header", "read_mask", "resample_mask"]

# Steps of uint8 or uint16 up to which values are numbers of classes and no grey levels.
CLASSES = 63
# Share of the maximum that values beside the background lose or gain where an image is saved with loss.
LOSS = 1 / 16
# Share of the pixels between background and maximum that lie beside a brighter one. Where edges were
# smoothed, by drawing, resizing or compressing, it is at least 0.36; between classes, at most 0.15.
SMOOTHED = 0.25


@dataclass(frozen=True, eq=False)
class Mask:
    """A mask as it was read.

    Attributes
    ----------
    marked : (H, W) bool
        Where the defect is.
    was_cut : bool
        Its edges were smoothed, and it was cut at half of its maximum.
    is_turned : bool
        It carries an EXIF orientation, which was obeyed.
    """

    marked: NDArray[np.bool_]
    was_cut: bool
    is_turned: bool


def read_mask(path: StrPath) -> NDArray[np.bool_]:
    """Read a ground-truth mask.

    - Where alpha varies, it is the mask; else the brightest channel is. Palettes are looked up.
    - The darkest value is background, if there is another, and black always is. Every other value is
      defect: 1 as well as 255, and the numbers of classes.
    - A mask whose edges are smoothed (a JPEG file, or grey values that lead from dark to bright) is cut
      at half of its maximum.
    - An EXIF orientation is obeyed.

    Parameters
    ----------
    path : a file, or a folder of masks of one image, whose union it is

    Returns
    -------
    (H, W) bool

    Raises
    ------
    ImageError
        As `npad.images.read_image`; the background cannot be told; masks of one image differ in size.
    """
    return load_mask(path).marked


def load_mask(path: StrPath, max_pixels: int = MAX_PIXELS) -> Mask:
    """As `read_mask`, with what is to be said of the mask.

    Raises
    ------
    ImageError
        As `read_mask`; or it has more than ``max_pixels`` pixels.
    """
    if not Path(path).is_dir():
        return _load(path, max_pixels)
    masks = {part: _load(part, max_pixels) for part in find_images(path)}
    first = next(iter(masks))
    for part, mask in masks.items():
        if mask.marked.shape != masks[first].marked.shape:
            raise ImageError(part, f"not of the size of {first}, though both show one image")
    return Mask(
        np.logical_or.reduce([mask.marked for mask in masks.values()]),
        any(mask.was_cut for mask in masks.values()),
        any(mask.is_turned for mask in masks.values()),
    )


def resample_mask(mask: NDArray[np.bool_], size: tuple[int, int]) -> NDArray[np.bool_]:
    """Bring a mask to another size: each pixel takes the value that lies at its centre.

    Parameters
    ----------
    mask : (H, W) bool
    size : (height, width)

    Returns
    -------
    (height, width) bool
    """
    rows, columns = (
        ((np.arange(n) + 0.5) * own / n).astype(np.intp)
        for n, own in zip(size, mask.shape, strict=True)
    )
    return mask[rows[:, None], columns]


def read_header(path: StrPath, max_pixels: int = MAX_PIXELS) -> Stored | None:
    """What a file says before it is decoded; None where that cannot be read."""
    reading = Reading(None, max_pixels)
    with suppress(ImageError), opened(path, str(path), reading) as stored:
        return stored
    return None


def _load(path: StrPath, max_pixels: int) -> Mask:
    reading = Reading(None, max_pixels)
    pixels = read_image(path, reading)
    with opened(path, str(path), reading) as stored:
        is_jpeg, is_turned = stored.is_jpeg, stored.orientation > 1
        if stored.n_pages > 1 and not is_jpeg:
            raise ImageError(
                path,
                f"holds {stored.n_pages} pages: save one mask to a file; several masks of one image "
                "go into a folder that has its name",
            )
        if stored.alpha is not None:
            alpha = np.asarray(upright(stored.alpha(), stored.orientation))
            pixels = alpha[..., None] if alpha.min() < alpha.max() else pixels
    levels = pixels.max(axis=2)
    _check_background(path, pixels, levels)
    low, high = float(levels.min()), float(levels.max())
    between = (levels > low) & (levels < high)
    was_cut = bool(between.any()) and (is_jpeg or _is_smoothed(pixels, levels, between))
    if was_cut or is_jpeg:
        marked = (levels >= high / 2) & (levels > 0)
    else:
        marked = levels > (low if low < high else 0)
    return Mask(marked, was_cut, is_turned)


def _check_background(path: StrPath, pixels: Array, levels: Array) -> None:
    """Refuse colours none of which is dark: any of them may be the background."""
    is_dark = 4 * float(levels.min()) <= float(levels.max())
    is_grey = (pixels == pixels[..., :1]).all()
    if not is_dark and not is_grey and (pixels != pixels[0, 0]).any():
        raise ImageError(
            path, "colours on a background that is not black: save the mask in white on black"
        )


def _is_smoothed(pixels: Array, levels: Array, between: NDArray[np.bool_]) -> bool:
    """Whether values lead from the background to the maximum, and do not number classes."""
    low, high = float(levels.min()), float(levels.max())
    steps = 1 if levels.dtype == np.uint8 else 65535
    level = levels[between].astype(np.float32)
    if high * steps <= CLASSES or level.max() < high / 2:  # a few classes, and what is void
        return False
    if level.min() - low <= high * LOSS:  # up to the maximum: loss leaves values everywhere
        return True
    beside_brighter = ndimage.maximum_filter(levels, 3)[between] > level
    brightest = pixels[np.unravel_index(levels.argmax(), levels.shape)] / high
    other_colour = np.abs(pixels[between] - level[:, None] * brightest).max(axis=1) > level / 2
    # What loss leaves in flat places is little.
    weights = np.minimum(level - low, high - level) ** 2
    return bool(np.average(beside_brighter & ~other_colour, weights=weights) > SMOOTHED)
