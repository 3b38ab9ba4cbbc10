"""Images in memory: which axis is which, and the single images in a batch of any kind."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from npad.images.samples import Array, Entry

__all__ = ["item_images", "single_image", "split_images"]

DTYPES = (np.uint8, np.uint16, np.float16, np.float32, np.float64)
CHANNELS = (1, 3, 4)
NARROW = 16  # columns: an image of fewer, and of more rows, is rather one of many channels


def item_images(item: object, number: int, *, batched: bool = False) -> list[Entry]:
    """The images of one item of an iterable; where it is a batch, three axes are grey images."""
    where = f"source, item {number}"
    if isinstance(item, Mapping):
        if "image" not in item:
            raise TypeError(f'{where}: a mapping must have the key "image", got {list(item)}')
        item = item["image"]
    elif isinstance(item, (list, tuple)) and not _is_list_of_images(item):
        item = item[0]
    if isinstance(item, (list, tuple)):
        found = sorted({str(tuple(getattr(x, "shape", (type(x).__name__,)))) for x in item})
        raise ValueError(
            f"{where}: a batch must be one array (N, C, H, W) of images of one size, or a single "
            f"image, got a {type(item).__name__} of {len(item)}: {', '.join(found)}"
        )
    if isinstance(item, (np.ndarray, Tensor)):
        return list(split_images(item, where, grey_batch=batched))
    image = single_image(item)
    if image is None:
        raise TypeError(
            f"{where}: expected an array, a tensor, a path, an image of Pillow's or the bytes of a "
            f"file, got {type(item).__name__}"
        )
    return [image]


def single_image(item: object) -> Entry | None:
    """A path, an image of Pillow's, the bytes of a file or what an open file holds; else None."""
    if isinstance(item, (str, os.PathLike, Image.Image, bytes)):
        return item
    if isinstance(item, (bytearray, memoryview)):
        return bytes(item)
    file = getattr(item, "file", item)  # what tempfile and web servers wrap
    if isinstance(file, io.TextIOBase):
        raise TypeError('a file that is open as text: open it with mode "rb"')
    if isinstance(file, io.IOBase):
        if file.seekable():
            file.seek(0)  # wherever its writer has left off
        return bytes(file.read())
    return None


def _is_list_of_images(item: Sequence[object]) -> bool:
    """Whether taking the first element alone would lose images."""
    if not item:
        return True
    first, *others = item
    if isinstance(first, (np.ndarray, Tensor)):
        same = [x for x in others if isinstance(x, (np.ndarray, Tensor))]
        return bool(same) and same[0].ndim == first.ndim < 4
    return any(type(x) is type(first) for x in others) and single_image(first) is not None


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
    if grey_batch and ndim == 3 and shape[0] in CHANNELS[1:] and not last:
        n, *size = shape
        raise ValueError(
            f"{where}: shape {shape} is one colour image (C, H, W) or {n} grey ones (N, H, W): pass "
            f"it as {(1, *shape)} with images[None], or as {(n, 1, *size)} with images[:, None]"
        )
    if grey_batch and ndim == 3 and not (first or last) and shape[2] < NARROW <= shape[1]:
        raise ValueError(
            f"{where}: shape {shape} is one image of {shape[2]} channels, of which 1, 3 or 4 are read, "
            f"or {shape[0]} grey ones {shape[2]} pixels wide: pass these with images[..., None]"
        )
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
