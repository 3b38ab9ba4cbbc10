"""One image: read, checked, resized and scaled to [0, 1]."""

from __future__ import annotations

import io
import os
import stat
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from PIL.ImageFile import ImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor

from npad.images.alignment import Motion
from npad.images.errors import ImageError
from npad.images.formats import find_reader
from npad.images.orientation import TURNS_AXES, upright
from npad.images.pillow import pillow_size, read_pillow
from npad.images.quiet import quiet_pillow
from npad.images.samples import (
    AS_IT_SAYS,
    Array,
    Entry,
    Reading,
    Samples,
    StrPath,
    TooLargeError,
    check_size,
)
from npad.images.scaling import as_pixels, is_constant, resized, size_of, white_level
from npad.images.stored import Stored

__all__ = [
    "LARGE",
    "Loaded",
    "load",
    "opened",
    "read_image",
    "read_samples",
    "read_thumbnail",
    "upright_size",
]

LARGE = 1 << 25  # pixels: one such image is held at a time; and bytes that are read at once
_one_large = threading.Lock()
_one_opened = threading.Lock()


def read_image(image: Entry, reading: Reading = AS_IT_SAYS, name: str | None = None) -> Array:
    """Read one image as RGB, turned as its EXIF orientation says.

    PNG, JPEG, BMP, TIFF, WebP or PNM, told by content and not by suffix; of several frames the
    first. Grey becomes three equal channels, palettes and CMYK become RGB, alpha is dropped. 16-bit
    values are divided by what the file says is white, else by what ``bit_depth`` says, else by 65535;
    floating-point TIFF must lie in [0, 1] already.

    Parameters
    ----------
    image : path or bytes of a file, an image of Pillow's, or an array (H, W, C)
    reading : what it may not say of itself
    name : how an error calls it; the path by default

    Returns
    -------
    (H, W, 3) uint8, or float32 in [0, 1] for 16-bit and floating-point values

    Raises
    ------
    ImageError
        Whatever is wrong with it: missing, not an image, cut short, damaged, too large.
    """
    if name is None:
        name = os.fspath(image) if isinstance(image, (str, os.PathLike)) else "image"
    samples = read_samples(image, name, reading)
    white, _ = white_level(samples, name, reading)
    return as_pixels(samples.values, white)


def read_thumbnail(image: Entry, side: int, reading: Reading = AS_IT_SAYS) -> Array:
    """Read one image as `read_image` does, but make its longer side this long; (h, w, 3) uint8.

    Raises
    ------
    ImageError
        As `read_image`.
    """
    name = os.fspath(image) if isinstance(image, (str, os.PathLike)) else "image"
    samples = read_samples(image, name, reading, (side, side))
    white, _ = white_level(samples, name, reading)
    height, width = size_of(samples.values)
    scale = side / max(height, width)
    size = max(1, round(scale * height)), max(1, round(scale * width))
    small = np.empty((3, *size), np.float32)
    small[:] = resized(samples.values, white, size)  # grey is broadcast
    return np.rint(255 * small.transpose(1, 2, 0)).astype(np.uint8)


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
    region : (height, width) float32
        1 inside the image's own region of interest and 0 outside; None where it has none.
    motion : from a template to the image, where it was registered to one
    unaligned : why it was not, where that failed
    """

    tensor: Tensor
    size: tuple[int, int]
    pixels: Array | None
    constant: bool = False
    undeclared: int | None = None
    n_pages: int = 1
    region: Tensor | None = None
    motion: Motion | None = None
    unaligned: str | None = None

    @property
    def with_region(self) -> Tensor:
        """The region as a fourth channel, where there is one."""
        return self.tensor if self.region is None else torch.cat([self.tensor, self.region[None]])


def load(
    image: Entry,
    name: str,
    image_size: tuple[int, int],
    reading: Reading = AS_IT_SAYS,
    *,
    keep_pixels: bool = False,
) -> Loaded:
    """Bring one image to the form that the backbone takes.

    Parameters
    ----------
    image
        Path or bytes of a file, an image of Pillow's, or (H, W, C), uint8, uint16 or floating
        point, with 1, 3 or 4 channels.
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
    ordinary = replace(reading, max_pixels=min(reading.max_pixels, LARGE))
    try:
        return _load(read_samples(image, name, ordinary), name, image_size, reading, keep_pixels)
    except TooLargeError:
        if reading.max_pixels <= LARGE:
            raise
    least = None if keep_pixels else image_size
    with _one_large:
        samples = read_samples(image, name, reading, least)
        return _load(samples, name, image_size, reading, keep_pixels)


def _load(
    samples: Samples, name: str, image_size: tuple[int, int], reading: Reading, keep_pixels: bool
) -> Loaded:
    values = samples.values
    white, undeclared = white_level(samples, name, reading)
    out = np.empty((3, *image_size), np.float32)
    out[:] = resized(values, white, image_size)  # grey is broadcast
    return Loaded(
        torch.from_numpy(out),
        samples.size or size_of(values),
        as_pixels(values, white) if keep_pixels else None,
        constant=is_constant(values, out),
        undeclared=undeclared,
        n_pages=samples.n_pages,
    )


def read_samples(
    image: Entry, name: str, reading: Reading, least: tuple[int, int] | None = None
) -> Samples:
    """What an image holds; of a JPEG perhaps at a smaller size, but twice ``least`` or more."""
    if isinstance(image, np.ndarray):
        return Samples(image[:, :, 0] if image.shape[2] == 1 else image[:, :, :3])
    if isinstance(image, Image.Image) and not _is_misread(image):
        with _nothing_but_image_errors(name):
            return read_pillow(image, name, reading)
    with opened(image, name, reading) as stored:
        if least is not None and stored.reduced is not None:
            turned = stored.orientation in TURNS_AXES
            samples = stored.reduced(least[::-1] if turned else least)
        else:
            samples = stored.decode()
        values = upright(samples.values, stored.orientation)
        return Samples(values, samples.white, stored.n_pages, stored.upright_size)


def upright_size(image: Entry, name: str, reading: Reading) -> tuple[int, int]:
    """(height, width) of an image as it is displayed; nothing is decoded.

    Raises
    ------
    ImageError
        As `read_image`, of the header.
    """
    if isinstance(image, np.ndarray):
        return image.shape[0], image.shape[1]
    if isinstance(image, Image.Image) and not _is_misread(image):
        return pillow_size(image)
    with opened(image, name, reading) as stored:
        return stored.upright_size


@contextmanager
def opened(image: StrPath | bytes | Image.Image, name: str, reading: Reading) -> Iterator[Stored]:
    """The image in a file: it can be decoded as long as the context lasts.

    Raises
    ------
    ImageError
        As `read_image`, of the header and of whatever is decoded in the context.
    """
    with _nothing_but_image_errors(name), _open(image, name) as file:
        stored = find_reader(file, name)(file, name, reading)
        height, width = stored.size
        check_size(width, height, name, reading)
        yield stored


@contextmanager
def _nothing_but_image_errors(name: str) -> Iterator[None]:
    try:
        with quiet_pillow():
            yield
    except ImageError:
        raise
    except Exception as error:  # decoders raise anything at all on damaged bytes
        raise ImageError(name, _reason(error)) from error


def _is_misread(image: Image.Image) -> bool:
    """Whether Pillow has yet to decode a page of a file that it may get wrong.

    It keeps 8 bits of 16-bit colour, and mixes up some planes and orders of bytes of TIFF.
    """
    if not isinstance(image, (PngImageFile, TiffImageFile)) or not image.tile or image.tell() > 0:
        return False
    return isinstance(image, TiffImageFile) or str(image.tile[0][3]).endswith(";16B")


def _open(image: StrPath | bytes | Image.Image, name: str) -> BinaryIO:
    if isinstance(image, Image.Image):
        assert isinstance(image, ImageFile)
        assert image.fp is not None  # it is not decoded
        with _one_opened:  # the same image may be in a list twice
            at = image.fp.tell()
            image.fp.seek(0)
            data = image.fp.read()
            image.fp.seek(at)
        return io.BytesIO(data)
    if isinstance(image, bytes):
        return io.BytesIO(image)
    path = Path(image)
    about = path.stat()
    if not (stat.S_ISREG(about.st_mode) or stat.S_ISDIR(about.st_mode)):
        # To open a pipe is to wait for its writer.
        raise ImageError(name, "a pipe, a device or a socket: pass the bytes that come from it")
    if about.st_size > LARGE:
        return path.open("rb")
    return io.BytesIO(path.read_bytes())  # at once, as a file server likes it


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read: {error.strerror}"
    if isinstance(error, MemoryError):
        return "damaged, or too large for the memory; remove or replace it"
    # What Python says of bytes that are missing is of no use.
    is_plain = isinstance(error, (struct.error, LookupError))
    told = "" if is_plain else f" ({error or type(error).__name__})"
    return f"damaged or cut short{told}; remove or replace it"
