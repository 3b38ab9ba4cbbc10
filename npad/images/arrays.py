"""Images in arrays: which axis is which, and the single images in a batch of any kind."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from npad.images.decoding import DTYPES
from npad.images.samples import Array

__all__ = ["item_images", "split_images"]

CHANNELS = (1, 3, 4)


def item_images(item: object, number: int) -> list[Array]:
    """The images of one item of an iterable, each (H, W, C)."""
    where = f"source, item {number}"
    if isinstance(item, Mapping):
        if "image" not in item:
            raise TypeError(f'{where}: a mapping must have the key "image", got {list(item)}')
        item = item["image"]
    elif isinstance(item, (list, tuple)) and not _is_list_of_images(item):
        item = item[0]
    if isinstance(item, (list, tuple)):
        sizes = sorted({tuple(x.shape) for x in item if isinstance(x, (np.ndarray, Tensor))})
        raise ValueError(
            f"{where}: a batch must be one array (N, C, H, W) of images of one size, "
            f"got a {type(item).__name__} of {len(item)} with the shapes {sizes}"
        )
    if isinstance(item, (str, os.PathLike)):
        raise TypeError(f"{where} is a path: pass paths as a list")
    if not isinstance(item, (np.ndarray, Tensor)):
        raise TypeError(f"{where}: expected an array or a tensor, got {type(item).__name__}")
    return split_images(item, where, grey_batch=False)


def _is_list_of_images(item: Sequence[object]) -> bool:
    """Whether taking the first element alone would lose images."""
    arrays = [x for x in item if isinstance(x, (np.ndarray, Tensor))]
    return not item or (len(arrays) > 1 and arrays[0].ndim == arrays[1].ndim < 4)


def split_images(images: Array | Tensor, where: str, *, grey_batch: bool) -> list[Array]:
    """Views (H, W, C) of the images in an array, after a check of its dtype and shape."""
    if isinstance(images, Tensor):
        images = images.detach().cpu()
        images = (images.float() if images.dtype == torch.bfloat16 else images).numpy()
    if images.dtype == object:
        raise TypeError(f"{where}: two image sizes cannot form one array; pass a list of images")
    if images.dtype.type not in DTYPES:
        raise TypeError(
            f"{where}: dtype {images.dtype} is not supported; convert to uint8, uint16, or to "
            "floating point in [0, 1]"
        )
    ndim, shape = images.ndim, images.shape
    last = ndim in (3, 4) and shape[-1] in CHANNELS
    first = ndim in (3, 4) and shape[-3] in CHANNELS
    if last and first:
        raise ValueError(f"{where}: cannot tell which axis of {shape} holds the channels")
    if first:
        images = np.moveaxis(images, -3, -1)
    elif ndim == 2 or (ndim == 3 and grey_batch and not last):
        images = images[..., None]
    elif not last:
        raise ValueError(
            f"{where}: expected images (N, H, W, C) or (N, C, H, W) with 1, 3 or 4 channels, "
            f"got shape {shape}"
        )
    if 0 in images.shape[-3:]:
        raise ValueError(f"{where}: shape {shape} has images without pixels")
    return list(images) if images.ndim == 4 else [images]
