"""Many images: folders, files, images in memory and iterables become batches of RGB in [0, 1].

Files are decoded and resized by worker threads a bounded number of images ahead of the consumer
(Pillow releases the interpreter lock for both). Every image is processed by itself, so the result
does not depend on the batch size or on the number of workers.
"""

from __future__ import annotations

import math
import os
import warnings
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from npad.images.alignment import Aligner, Motion
from npad.images.arrays import item_images, single_image, split_images
from npad.images.decoding import LARGE, Loaded, load, upright_size
from npad.images.depth import Range
from npad.images.errors import ImageError
from npad.images.folders import find_images
from npad.images.roi import RegionsOfInterest, without_masks
from npad.images.samples import AS_IT_SAYS, Array, Entry, Reading, StrPath, TooLargeError

__all__ = ["Batch", "ImageSource", "default_workers"]

Task: TypeAlias = "tuple[int, str, Entry]"  # position, name, image
_NAMED = 10  # constant images; a dead camera would fill the terminal


@dataclass(frozen=True, eq=False)
class Batch:
    """Images that are ready for the backbone.

    Attributes
    ----------
    images : (B, 3, H, W) float32
        RGB in [0, 1], resized to the source's ``image_size``; where images have regions of their own,
        (B, 4, H, W), the fourth channel 1 inside and 0 outside.
    sizes : list of (height, width)
        The size of each image as displayed, that is after its EXIF orientation.
    names : list of str
        The path as given, or ``"image[17]"`` for what has none.
    indices : list of int
        The position of each image in the source.
    pixels : list of (H, W, 3) uint8, or float32 in [0, 1]
        Each image as it was decoded, where the source keeps them; else empty.
    motions : list of Motion or None
        From the template to each image, where they are registered to one; None for an image that is
        as it came. Else empty.
    unaligned : list of (name, reason)
        The images that could not be registered to it.
    """

    images: Tensor
    sizes: list[tuple[int, int]]
    names: list[str]
    indices: list[int]
    pixels: list[Array] = field(default_factory=list)
    motions: list[Motion | None] = field(default_factory=list)
    unaligned: list[tuple[str, str]] = field(default_factory=list)


class ImageSource:
    """Batches of images from a folder, files, arrays, or an iterable of batches.

    Nothing is decoded before `batches` runs.

    Parameters
    ----------
    source
        - A folder (searched by `list_images`), a file, or a list of both.
        - One image in memory or a list of them: an image of Pillow's, or a file's bytes, also in a
          ``BytesIO`` or an open file.
        - An array or tensor: (H, W), (H, W, C), (C, H, W), (N, H, W), (N, H, W, C) or
          (N, C, H, W); RGB order; uint8, uint16 or floating in [0, 1]. The channels are the first or
          last axis of 1, 3 or 4. Three or four grey images are told from one colour image by a fourth
          axis: (N, 1, H, W) or (1, C, H, W). An array of paths is a list of them.
        - A list of such arrays, or any iterable of paths, images or batches (a DataLoader for one). A
          batch is an array, a tuple or list with the images first, or a mapping with the key
          ``"image"``; in three dimensions it is a single image. A batch is split to ``batch_size``,
          never merged, unless it comes in a list.
    image_size : (height, width)
        Every image is resized to exactly this, bilinearly with antialiasing, without a crop and
        without keeping its aspect. An image of this size is left as it is.
    batch_size : int
        Images in one batch, at most.
    workers : int, optional
        Decoding threads; by default one for each available core, at most 8.
    skip_bad : bool
        Leave out images that raise `ImageError` and list them in ``skipped``.
    page_locked : bool
        Put the batches in memory from which a GPU copies while the CPU goes on.
    reading : Reading
        What the images may not say of themselves.
    fitted : Range, optional
        That of a model: an image of another bit depth is refused. None, for a fit, fills
        ``undeclared`` and ``other_sizes``.
    keep_pixels : bool
        Hand out the images as they were decoded, too.
    masks : str, optional
        Pattern of the names of masks, as `RegionsOfInterest` has it: an image that is the mask of
        another is left out. By default that of the regions.
    regions : RegionsOfInterest, optional
        That of the model, and those of the images.
    aligner : Aligner, optional
        Registers each image to a template, in the decoding threads.

    Attributes
    ----------
    aligner : Aligner or None
        Heeded by what `batches` begins after it is set.
    n_images : int or None
        Number of images, bad ones included; None if it cannot be known before iterating.
    reiterable : bool
        False for an iterator, whose images come only once.
    random_access : bool
        Whether `batches` takes indices: True for paths and arrays, False for an iterable.
    skipped : list of (name, reason)
        The images left out so far.
    unaligned : list of (name, reason)
        The images so far that could not be registered to the template.
    other_sizes : dict of position to name and (height, width)
        The images so far that were resized.
    undeclared : dict of position to largest value
        The images so far whose values have 16 bits and that do not say how many of them the camera
        fills.

    Raises
    ------
    ImageError
        A path that does not exist, or a folder without images.
    TypeError
        A source or dtype that is not supported.
    ValueError
        A shape that is not supported, or that may be read in two ways.

    Warns
    -----
    UserWarning
        Every pixel of an image is equal; of a file's pages, the first is read.
    """

    n_images: int | None
    reiterable: bool
    random_access: bool
    skipped: list[tuple[str, str]]
    unaligned: list[tuple[str, str]]
    undeclared: dict[int, int]
    other_sizes: dict[int, tuple[str, tuple[int, int]]]

    def __init__(
        self,
        source: object,
        *,
        image_size: tuple[int, int],
        batch_size: int = 8,
        workers: int | None = None,
        skip_bad: bool = False,
        page_locked: bool = False,
        reading: Reading = AS_IT_SAYS,
        fitted: Range | None = None,
        keep_pixels: bool = False,
        masks: str | None = None,
        regions: RegionsOfInterest | None = None,
        aligner: Aligner | None = None,
    ) -> None:
        if workers is None:
            workers = default_workers()
        limits = {"image_size": min(image_size), "batch_size": batch_size, "workers": workers}
        for name, value in limits.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.image_size = image_size
        self.batch_size = batch_size
        self.workers = workers
        self.skip_bad = skip_bad
        self.page_locked = page_locked
        self.reading = reading
        self.fitted = fitted
        self.keep_pixels = keep_pixels
        self.regions = regions
        self.aligner = aligner
        self.skipped = []
        self.unaligned = []
        self.undeclared = {}
        self.other_sizes = {}
        self._constant: set[int] = set()  # positions of images that were named
        self._told_of_pages = False
        self._entries: Sequence[Entry] = ()  # images, or
        self._stream: Iterable[object] | None = None  # an iterable of batches
        self._used_up = False

        if isinstance(source, np.ndarray) and _holds_paths(source):
            source = source.ravel().tolist()
        image = single_image(source)
        if isinstance(image, (str, os.PathLike)):
            if not Path(image).exists():
                raise ImageError(image, "no such file or folder")
            self._entries = _files(image)
        elif image is not None:
            self._entries = [image]
        elif isinstance(source, (np.ndarray, Tensor)):
            self._entries = split_images(source, "source", grey_batch=True)
        elif isinstance(source, (list, tuple)):
            self._entries = [x for i, item in enumerate(source) for x in _listed(item, i)]
        elif isinstance(source, Iterable):
            self._stream = source
        else:
            raise TypeError(
                "source must be a folder, a list of paths, an array, a tensor, images of Pillow's or "
                "an iterable of batches (a data set goes through a DataLoader), got "
                f"{type(source).__name__}"
            )

        if masks is None and regions is not None:
            masks = regions.pattern
        if masks is not None:
            self._entries = _without_masks(self._entries, masks)
        self.reiterable = self._stream is None or not isinstance(source, Iterator)
        self.random_access = self._stream is None
        self.n_images = len(self._entries) if self.random_access else _loader_length(source)
        if self.n_images == 0:
            raise ValueError("source holds no images")
        if regions is not None:
            regions.check_number(self.n_images if self.random_access else None)

    @property
    def paths(self) -> list[str] | None:
        """Of its files, as they were given, in order; None where an image is no file."""
        names = [os.fspath(x) for x in self._entries if isinstance(x, (str, os.PathLike))]
        return names if names and len(names) == len(self._entries) else None

    def batches(self, indices: Sequence[int] | None = None) -> Generator[Batch]:
        """Decode, resize and yield the images in order.

        Closing the iterator, or an exception in its consumer, ends the worker threads.

        Parameters
        ----------
        indices : sequence of int, optional
            Positions of the images to yield, in this order; all by default. Needs paths or arrays:
            an iterable of batches has no random access.

        Raises
        ------
        ImageError
            A bad image, in place of the batch that would hold it (unless ``skip_bad``).
        IndexError
            An index out of range.
        ValueError
            Indices into an iterable; an iterator used a second time; an iterable without images.
        """
        if self._stream is not None:
            if indices is not None:
                raise ValueError("indices need a source of paths or arrays, not an iterable")
            if self._used_up:
                raise ValueError("the source is an iterator that is used up: pass a list instead")
            self._used_up = not self.reiterable
            return self._run(_stream_tasks(self._stream, _in_batches(self._stream)))
        entries = self._entries
        if indices is None:
            indices = range(len(entries))
        for i in indices:
            if not 0 <= i < len(entries):
                raise IndexError(f"index {i} is out of range: the source has {len(entries)} images")
        return self._run(iter([[(int(i), _name(i, entries[i]), entries[i]) for i in indices]]))

    def size_of_first(self) -> tuple[int, int] | None:
        """(height, width) of the first image; None of a stream, and of an image that cannot be read.

        With ``skip_bad`` it is the first that can be read. Of a file only the header is.
        """
        for entry in self._entries if self.skip_bad else self._entries[:1]:
            with suppress(ImageError):
                return upright_size(entry, _name(0, entry), self.reading)
        return None

    def registered(self, batch: Batch, aligner: Aligner) -> Batch:
        """A batch of this source with its images registered, where it came without."""
        pairs = zip(batch.images, batch.sizes, strict=True)
        found = [aligner(image, size) for image, size in pairs]
        reasons = zip(batch.names, (one.reason for one in found), strict=True)
        unaligned = [(name, reason) for name, reason in reasons if reason is not None]
        self.unaligned += unaligned
        return replace(
            batch,
            images=self._stack([one.image for one in found]),
            motions=[one.motion for one in found],
            unaligned=unaligned,
        )

    def _run(self, groups: Iterator[list[Task]]) -> Generator[Batch]:
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="npad-images")
        try:
            for tasks in groups:
                good = self._good(self._ahead(pool, tasks))
                while batch := self._batch(good):
                    yield batch
                    del batch  # the consumer may let go of its pixels
        finally:
            pool.shutdown(cancel_futures=True)

    def _batch(self, good: Iterator[tuple[Task, Loaded]]) -> Batch | None:
        """The next images; fewer than `batch_size` where there are many pixels to hand out."""
        rows: list[tuple[Task, Loaded]] = []
        n_pixels = 0
        while len(rows) < self.batch_size and n_pixels < LARGE and (row := next(good, None)):
            rows.append(row)
            n_pixels += 0 if row[1].pixels is None else math.prod(row[1].size)
        if not rows:
            return None
        reasons = [(name, i.unaligned) for (_, name, _), i in rows if i.unaligned is not None]
        self.unaligned += reasons
        return Batch(
            images=self._stack([image.with_region for _, image in rows]),
            sizes=[image.size for _, image in rows],
            names=[name for (_, name, _), _ in rows],
            indices=[index for (index, _, _), _ in rows],
            pixels=[i.pixels for _, i in rows if i.pixels is not None],
            motions=[i.motion for _, i in rows] if self.aligner is not None else [],
            unaligned=reasons,
        )

    def _stack(self, images: list[Tensor]) -> Tensor:
        shape = len(images), *images[0].shape
        out = images[0].new_empty(shape, pin_memory=self.page_locked)
        return torch.stack(images, out=out)

    def _ahead(
        self, pool: ThreadPoolExecutor, tasks: Iterable[Task]
    ) -> Iterator[tuple[Task, Future[Loaded]]]:
        """Results in order, the next batch being decoded while the consumer holds this one."""
        max_pixels = self.reading.max_pixels
        if self.keep_pixels:
            max_pixels = min(max_pixels, LARGE)
        pending: deque[tuple[Task, Future[Loaded]]] = deque()
        for task in tasks:
            pending.append((task, pool.submit(self._load, task, max_pixels)))
            if len(pending) > self.batch_size + self.workers:
                yield pending.popleft()
        while pending:
            yield pending.popleft()

    def _load(self, task: Task, max_pixels: int) -> Loaded:
        index, name, entry = task
        loaded = load(
            entry,
            name,
            image_size=self.image_size,
            reading=replace(self.reading, max_pixels=max_pixels),
            keep_pixels=self.keep_pixels,
        )
        if self.regions is not None:
            return replace(loaded, region=self.regions.of(index, name, entry, loaded.size))
        if self.aligner is None:
            return loaded
        found = self.aligner(loaded.tensor, loaded.size)
        return replace(loaded, tensor=found.image, motion=found.motion, unaligned=found.reason)

    def _result(self, task: Task, future: Future[Loaded]) -> Loaded:
        """What was loaded ahead, or a large image now: the pixels of several would pile up."""
        try:
            return future.result()
        except TooLargeError:
            return self._load(task, self.reading.max_pixels)

    def _good(
        self, results: Iterable[tuple[Task, Future[Loaded]]]
    ) -> Iterator[tuple[Task, Loaded]]:
        for task, future in results:
            try:
                loaded = self._result(task, future)
                self._look_at(loaded, task)
            except ImageError as error:
                if not self.skip_bad:
                    raise
                if (error.path, error.reason) not in self.skipped:  # a second pass finds it again
                    self.skipped.append((error.path, error.reason))
            else:
                yield task, loaded
                del loaded  # its pixels may be large

    def _look_at(self, image: Loaded, task: Task) -> None:
        """Refuse or remark upon what an image is as a whole."""
        index, name, _ = task
        if self.fitted is None and image.size != self.image_size:
            self.other_sizes[index] = name, image.size
        if self.fitted is not None:
            self.fitted.check_bright(image.tensor, name)
            if image.undeclared is not None:
                self.fitted.check_dark(image.undeclared, name, self.reading.bit_depth)
        elif image.undeclared is not None:
            self.undeclared[index] = image.undeclared
        if image.n_pages > 1 and not self._told_of_pages:
            self._told_of_pages = True
            _warn(f"{name} has {image.n_pages} pages: the first is read, of every such file")
        if image.constant and index not in self._constant and len(self._constant) <= _NAMED:
            self._constant.add(index)
            if len(self._constant) <= _NAMED:
                _warn(
                    f"{name}: every pixel is equal, as after a failed exposure or where a file is "
                    "misread; look at it"
                )
            else:
                _warn("there are more images whose pixels are all equal; they are not named")


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=2)


def _holds_paths(array: Array) -> bool:
    if array.dtype.kind == "U":
        return True
    return array.dtype == object and all(isinstance(x, (str, os.PathLike)) for x in array.flat)


def _listed(item: object, number: int) -> Sequence[Entry]:
    """The images of one item of a list, which may be a folder."""
    if isinstance(item, (str, os.PathLike)):
        return _files(item)
    return item_images(item, number)


def _files(path: StrPath) -> Sequence[StrPath]:
    """A file, or the images of a folder."""
    return find_images(path) if Path(path).is_dir() else [path]


def _without_masks(entries: Sequence[Entry], pattern: str) -> list[Entry]:
    paths = [Path(x) for x in entries if isinstance(x, (str, os.PathLike))]
    images = set(without_masks(paths, pattern))
    return [x for x in entries if not isinstance(x, (str, os.PathLike)) or Path(x) in images]


def _in_batches(stream: object) -> bool:
    """Whether each item is known to be a batch, so that three axes are not those of one image."""
    if not isinstance(stream, DataLoader):
        return False
    return stream.batch_sampler is not None and stream.batch_size != 1


def _stream_tasks(stream: Iterable[object], batched: bool) -> Iterator[list[Task]]:
    """Tasks of one given batch after the other; no look-ahead, which would delay a camera."""
    start = 0
    for number, item in enumerate(stream):
        images = item_images(item, number, batched=batched)
        yield [(start + i, _name(start + i, image), image) for i, image in enumerate(images)]
        start += len(images)
    if start == 0:
        raise ValueError("source: the iterable yielded no images")


def _name(index: int, entry: Entry) -> str:
    return os.fspath(entry) if isinstance(entry, (str, os.PathLike)) else f"image[{index}]"


def _loader_length(source: object) -> int | None:
    """Images that a DataLoader yields, if its sampler alone decides that."""
    if not isinstance(source, DataLoader) or source.batch_size is None:
        return None
    if not isinstance(source.sampler, Sized):  # an iterable data set
        return None
    n_images = len(source.sampler)
    return n_images - n_images % source.batch_size if source.drop_last else n_images


def default_workers() -> int:
    """Threads that decode where none are chosen: one for each available core, at most 8."""
    if hasattr(os, "sched_getaffinity"):
        return min(8, len(os.sched_getaffinity(0)))
    return min(8, os.cpu_count() or 1)
