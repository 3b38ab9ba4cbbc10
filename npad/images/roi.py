"""Regions of interest as the user gives them: masks of a model and of its images, at the model's size.

What a region does to images and to grids of embeddings stands in `npad.roi`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from npad.file_names import shown
from npad.images.errors import ImageError
from npad.images.samples import Array, Entry, StrPath
from npad.roi import covered
from npad.settings import MAX_PIXELS, Drawn

__all__ = ["RegionsOfInterest", "is_mask", "region_of_model", "without_masks"]

Size: TypeAlias = "tuple[int, int]"
P = TypeVar("P", bound="str | os.PathLike[str]")
NEAR = 1e-6  # pixels by which a rectangle that was divided and multiplied may miss an edge


def region_of_model(roi: Any, size: Size, max_pixels: int = MAX_PIXELS) -> tuple[Tensor, Size]:
    """The argument ``roi`` at the model's size.

    Parameters
    ----------
    roi : as `npad.settings.Settings` holds it; None is the whole image
    size : (H, W) of the model
    max_pixels : of a mask

    Returns
    -------
    region : (H, W) uint8, 1 inside
    drawn_at : the size of the mask; that of the model for what is no mask

    Raises
    ------
    ValueError
        It leaves nothing; or its file cannot be read (ImageError).
    """
    height, width = size
    if isinstance(roi, str):
        mask = _read(roi, max_pixels)
    elif isinstance(roi, Drawn):
        array = roi.array
        mask = np.asarray(array.cpu() if isinstance(array, Tensor) else array) != 0
    else:
        mask = np.zeros(size, bool)
        top, left, rows, columns = (0.0, 0.0, 1.0, 1.0) if roi is None else roi
        mask[_within(top, rows, height), _within(left, columns, width)] = True
    region = _shrunk(mask, size)
    if not region.any():
        raise ValueError(
            f"NPad: roi must leave something: no pixel of an image of {height} x {width}, as the model "
            "sees it, lies in it as a whole; give a larger region, or a larger image_size"
        )
    return torch.from_numpy(region.astype(np.uint8)), mask.shape


def _within(start: float, length: float, size: int) -> slice:
    """The pixels that lie in a part of an axis as a whole."""
    first, last = np.ceil(start * size - NEAR), np.floor((start + length) * size + NEAR)
    return slice(int(first), max(int(first), int(last)))


def _shrunk(mask: NDArray[np.bool_], size: Size) -> NDArray[np.bool_]:
    """A mask at another size: a pixel is inside where every pixel of the mask that it touches is."""
    for axis, n in enumerate(size):
        own, index = mask.shape[axis], np.arange(n, dtype=np.int64)
        ends = np.stack([index * own // n, -((index + 1) * -own // n)], 1).ravel()  # overlap
        padded = np.pad(mask, [(0, int(axis == i)) for i in (0, 1)])  # the last end lies past it
        mask = np.logical_and.reduceat(padded, ends, axis)
        mask = mask[::2] if axis == 0 else mask[:, ::2]
    return mask


def _read(path: StrPath, max_pixels: int) -> NDArray[np.bool_]:
    from npad.images.masks import load_mask  # noqa: PLC0415  (slow to import)

    return load_mask(path, max_pixels).marked


def without_masks(paths: Iterable[P], pattern: str | None) -> list[P]:
    """Images without those that are the region of another one of them."""
    if pattern is None:
        return list(paths)
    pairs = [(path, _plain(path), _plain(_mask_of(path, pattern))) for path in paths]
    masks = {mask for _, image, mask in pairs if mask != image}
    return [path for path, image, _ in pairs if image not in masks]


def is_mask(path: StrPath, pattern: str) -> bool:
    """Whether a file is the region of an image that is there, or may come."""
    form = re.escape(pattern).replace(re.escape("{}"), "[^/]+")
    return re.search(f"(^|/){form}$", Path(path).as_posix()) is not None


def _mask_of(path: StrPath, pattern: str) -> Path:
    image = Path(path)
    return image.parent / pattern.replace("{}", image.stem)


def _plain(path: StrPath) -> str:
    return os.path.abspath(path)  # noqa: PTH100  (without following links)


class RegionsOfInterest:
    """The regions of a model and of its images, for a source of images.

    Parameters
    ----------
    roi : (H, W) uint8, the region of the model at its size
    own : where the region of each image is: a pattern, in which ``{}`` is the name of the image without
        its suffix, relative to its folder; or one for each image: the path of a mask, an (h, w) array,
        or None for the whole image; None: images have none
    grids : (h, w) of embeddings; a region covers a position of each
    extent : pixels (height, width) that the grids cover
    drawn_at : size of the mask that ``roi`` was made of, whose aspect is that of all images; None where
        nobody knows it any more
    max_pixels : of a mask

    Raises
    ------
    ValueError
        The region of the model covers no position of a grid; ``own`` is something else.
    """

    def __init__(
        self,
        roi: Tensor,
        own: str | Sequence[Any] | None = None,
        *,
        grids: Iterable[Size],
        extent: Size,
        drawn_at: Size | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        height, width = roi.shape
        self.roi = roi
        self.pattern = own if isinstance(own, str) else None
        self.own = None if isinstance(own, str) else own
        self.grids = sorted(set(grids))
        self.extent = extent
        self.size = height, width
        self.drawn_at = drawn_at if drawn_at != self.size else None
        self.max_pixels = max_pixels
        empty = self._uncovered(roi.bool())
        if empty is not None:
            raise ValueError(
                f"NPad: roi must leave something: it covers half of no position of the {_text(empty)} "
                "grid of a layer; give a larger region, a larger image_size, or finer layers"
            )

    def check_number(self, n_images: int | None) -> None:
        """Refuse a list of regions that is not one for each image of a source.

        Raises
        ------
        ValueError
            It is longer or shorter, or the source has no number of images.
        """
        if self.own is None:
            return
        if n_images is None:
            raise ValueError(
                "NPad: rois must be one for each image of a list, an array or a folder; a stream has "
                "none"
            )
        if len(self.own) != n_images:
            raise ValueError(
                f"NPad: rois must be one for each of {n_images} images, got {len(self.own)}"
            )

    def of(self, index: int, name: str, image: Entry, size: Size) -> Tensor | None:
        """The own region of an image, (H, W) float32, 1 inside; None where images have none.

        Parameters
        ----------
        index, name : position of the image in its source, and how an error calls it
        image : path or pixels
        size : (height, width) of the image

        Raises
        ------
        ImageError
            The mask is not there, cannot be read, has another aspect than the image or leaves
            nothing.
        ValueError
            The mask of the model has another aspect than the image.
        """
        if self.drawn_at is not None and not _same_aspect(self.drawn_at, size):
            raise ValueError(
                f"NPad: roi must have the aspect of all images: it is a mask of {_text(self.drawn_at)} "
                f"pixels, and {shown(name)} has {_text(size)}; draw it on one of the images, or give "
                f"it at image_size, {_text(self.size)}"
            )
        if self.pattern is None and self.own is None:
            return None
        given = self._given(index, name, image)
        if given is None:
            return torch.ones(self.size, device="cpu")
        called, mask = given
        if mask.shape != self.size and not _same_aspect(mask.shape, size):
            raise ImageError(
                called,
                f"a region of {_text(mask.shape)} pixels, of another aspect than {shown(name)}, "
                f"{_text(size)}: draw it on the image",
            )
        own = torch.from_numpy(_shrunk(mask, self.size))
        empty = self._uncovered(own & self.roi.bool())
        if empty is not None:
            raise ImageError(
                called,
                f"this region leaves nothing of {shown(name)}: it covers half of no position of the "
                f"{_text(empty)} grid of a layer; give a larger one, or leave the image out",
            )
        return own.float()

    def _given(self, index: int, name: str, image: Entry) -> tuple[str, NDArray[np.bool_]] | None:
        """Name and pixels of the mask of an image; None for the whole image."""
        if self.pattern is not None:
            if not isinstance(image, (str, os.PathLike)):
                raise ImageError(
                    name,
                    f"the model looks for a mask at {self.pattern}, beside each image, and this has no "
                    "path: give rois, one for each image, or set rois=None",
                )
            mask: Any = _mask_of(image, self.pattern)
            if _plain(mask) == _plain(image):
                raise ImageError(name, f"rois={self.pattern} makes the image its own mask")
        else:
            assert self.own is not None
            mask = self.own[index]
            if mask is None:
                return None
        if isinstance(mask, (str, os.PathLike)):
            if not Path(mask).is_file():
                raise ImageError(mask, f"there is no such file, the region of {shown(name)}")
            return os.fspath(mask), _read(mask, self.max_pixels)
        return f"rois[{index}]", _drawn(mask, f"rois[{index}]")

    def _uncovered(self, inside: Tensor) -> Size | None:
        """A grid of which it covers nothing."""
        known = ((g, covered(inside[None], g, self.extent)) for g in self.grids)
        return next((g for g, positions in known if not bool(positions.any())), None)


def _drawn(mask: Any, name: str) -> NDArray[np.bool_]:
    array: Array = np.asarray(mask.cpu() if isinstance(mask, Tensor) else mask)
    if array.ndim != 2 or 0 in array.shape or array.dtype.type not in (np.bool_, np.uint8):
        raise ImageError(
            name,
            "a region must be the path of a mask, an (H, W) array of bool or uint8, or None, got "
            f"{array.dtype} of shape {array.shape}",
        )
    return array != 0


def _same_aspect(a: Size, b: Size) -> bool:
    """Whether one is the other at another scale, sides rounded to pixels."""
    small, large = sorted((a, b))
    scales = [((s - 1) / side, (s + 1) / side) for s, side in zip(small, large, strict=True)]
    return max(low for low, _ in scales) <= min(high for _, high in scales)


def _text(size: Sequence[int]) -> str:
    return f"{size[0]} x {size[1]}"
