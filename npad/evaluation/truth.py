"""Where the defects of a category are: its masks, checked against their images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from npad.evaluation.datasets import Category, DatasetError, Sample
from npad.images.decoding import read_image
from npad.images.errors import ImageError
from npad.images.masks import Mask, load_mask, read_header, resample_mask
from npad.images.samples import Reading
from npad.images.stored import Stored
from npad.settings import MAX_PIXELS

__all__ = ["Truth", "check_masks", "read_truth", "wrong_size"]


@dataclass(frozen=True, eq=False)
class Truth:
    """Masks of the test images.

    Attributes
    ----------
    size : (height, width), the metric size
    masks : (H, W) bool of each image at this size; empty where the category has no masks
    own_sizes : (height, width) of the masks as they were read, by the position of their image
    is_empty : whether a mask as it was read marks nothing, by the position of its image
    notes : on the masks as they were read
    """

    size: tuple[int, int]
    masks: list[NDArray[np.bool_]]
    own_sizes: dict[int, tuple[int, int]]
    is_empty: dict[int, bool]
    notes: list[str]


def check_masks(category: Category, max_pixels: int = MAX_PIXELS) -> None:
    """Read all masks, so that what is wrong with one is met before other work is done.

    Raises
    ------
    ValueError
        A mask has not the size of its image.
    DatasetError
        The mask of a good image marks a defect.
    ImageError
        A mask cannot be read.
    """
    for sample in category.test:
        _read_mask(sample, max_pixels)


def _read_mask(sample: Sample, max_pixels: int) -> tuple[Mask, Stored | None] | None:
    """The mask, and what its image says before it is decoded; None where there is no mask."""
    if sample.mask_path is None:
        return None
    mask = load_mask(sample.mask_path, max_pixels)
    if not sample.is_anomalous and mask.marked.any():
        raise DatasetError(
            sample.path,
            f"a good image, but its mask {sample.mask_path} marks a defect: move the image to the"
            " folder of its defect, or remove the mask",
        )
    header = read_header(sample.path, max_pixels)
    if header is not None:
        _check_size(sample, mask.marked.shape, header, max_pixels)
    return mask, header


def _check_size(
    sample: Sample, mask_size: tuple[int, ...], header: Stored, max_pixels: int
) -> None:
    if mask_size == header.upright_size:
        return
    try:  # a header may say less than the whole file
        size = read_image(sample.path, Reading(None, max_pixels)).shape[:2]
    except ImageError:
        return  # met when it is scored
    if mask_size != size:
        raise wrong_size(sample, mask_size, size, header.orientation)


def wrong_size(
    sample: Sample, mask_size: tuple[int, ...], size: tuple[int, ...], orientation: int
) -> ValueError:
    """The error about a mask that does not fit on its image, which has this EXIF orientation."""
    text = (
        f"{sample.mask_path} is {mask_size[0]} x {mask_size[1]} pixels but"
        f" {sample.path} is {size[0]} x {size[1]} (height x width);"
    )
    if mask_size != size[::-1]:
        return ValueError(f"{text} a mask must have the size of its image")
    if orientation > 4:  # those that swap height and width
        why = "the image is turned by its EXIF orientation, the mask is not"
    else:
        why = "one of them was turned, by its EXIF orientation or otherwise"
    return ValueError(f"{text} {why}: save both upright")


def read_truth(category: Category, size: tuple[int, int], max_pixels: int = MAX_PIXELS) -> Truth:
    """Read, check and resample the masks of a category.

    Parameters
    ----------
    size : (height, width), the metric size
    max_pixels : a larger mask is refused

    Raises
    ------
    ValueError
        As `check_masks`.
    DatasetError
        As `check_masks`.
    ImageError
        As `check_masks`.
    """
    truth = Truth(size, [], {}, {}, [])
    n_cut = n_inverted = n_unsure = 0
    for i, sample in enumerate(category.test):
        read = _read_mask(sample, max_pixels)
        if read is None:
            truth.masks.append(np.zeros(size, dtype=bool))
            continue
        mask, header = read
        height, width = mask.marked.shape
        truth.own_sizes[i] = height, width
        truth.masks.append(resample_mask(mask.marked, size))
        truth.is_empty[i] = not mask.marked.any()
        n_cut += mask.was_cut
        n_inverted += mask.marked.mean() > 0.5
        if header is not None and not mask.is_turned:  # a swapped size would have told
            n_unsure += header.orientation in (2, 3, 4) or (
                header.orientation > 4 and height == width
            )
    if not category.has_masks:
        truth.masks.clear()
    n_defects = sum(sample.is_anomalous for sample in category.test)
    if n_cut:
        truth.notes.append(
            f"{_of(n_cut, 'mask')} had grey values between background and defect, as drawing with"
            f" smooth edges or JPEG leaves them, and {'was' if n_cut == 1 else 'were'} cut at half of"
            f" {'its' if n_cut == 1 else 'their'} maximum."
        )
    if category.has_masks and 2 * n_inverted > n_defects:
        truth.notes.append(
            f"The masks of {n_inverted} of {n_defects} defective images mark more than half of the"
            " image: they may be inverted. A defect is bright, the rest is black."
        )
    if n_unsure:
        truth.notes.append(
            f"{_of(n_unsure, 'image')} carried an EXIF orientation, the mask none: it was taken to"
            " be upright, as the image is once it is turned."
        )
    return truth


def _of(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"
