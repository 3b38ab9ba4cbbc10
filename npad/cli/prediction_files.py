"""What `npad predict` leaves in its folder: scores, maps and overlays.

Rows of scores are written as they come, under a name that says "partial", and get their own name
once every image is scored. Every picture appears whole or not at all.

The colour scale of the overlays is that of the whole run. Unless it is given, it is known at the end
only; until then pixels and maps wait on the disk, in a file that has no name.
"""

from __future__ import annotations

import csv
import io
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from npad.atomic_file import naming, remove_leftovers, replacing
from npad.evaluation.overlay import draw_overlay, eight_bit
from npad.images.errors import ImageError
from npad.images.folders import list_images
from npad.progress import track
from npad.scoring.fusion import resized
from npad.scoring.prediction import Prediction

__all__ = ["PredictionFiles", "find_inputs"]

SCORES = ("scores.csv", "scores.jsonl")
OVERLAYS, MAPS = "overlays", "maps"
_SAMPLE = 1 << 21  # values of all maps, from which the ends of the colour scale are taken

Waiting = tuple[str, NDArray[np.uint8], NDArray[np.float32]]  # path, pixels, map


def find_inputs(paths: Sequence[Path], folder: Path) -> dict[str, Path]:
    """Images to score, each once, and where its pictures go.

    Parameters
    ----------
    paths : files, and folders that are searched for images
    folder : of the output; overlays and maps of an earlier run that lie there are no input

    Returns
    -------
    dict from the image's path to its path below the deepest folder that holds all of ``paths``

    Raises
    ------
    ImageError
        A folder holds no images.
    """
    base = os.path.commonpath([_absolute(p if p.is_dir() else p.parent) for p in paths])
    pictures = [_absolute(folder) / part for part in (OVERLAYS, MAPS)]
    found: dict[Path, str] = {}
    for path in paths:
        images = list_images(path) if path.is_dir() else [path]
        absolute = {_absolute(image): str(image) for image in images}
        for picture in [p for p in absolute if any(p.is_relative_to(part) for part in pictures)]:
            del absolute[picture]
        if not absolute:
            raise ImageError(path, "the folder holds no images")
        found = absolute | found  # the first spelling of a path stays
    ordered = sorted(found.items()) if len(paths) > 1 else list(found.items())
    return {spelled: absolute.relative_to(base) for absolute, spelled in ordered}


def _absolute(path: Path) -> Path:
    """Without following links: an image that is linked twice has two names."""
    return Path(os.path.abspath(path))  # noqa: PTH100


class PredictionFiles:
    """Writer of the output folder; as a context manager it gives the scores their final name.

    Parameters
    ----------
    folder : made if it is not there
    inputs : from `find_inputs`
    maps, overlays : whether to write them
    color_range : map values at the ends of the overlays' colour scale. None takes the median and
        the 99.9th percentile of all maps of the run: then overlays are drawn at the end, and until
        then the folder's disk holds three bytes for each pixel of the images and four for each pixel
        of the maps at the model's size.
    progress : as for `npad.progress.task`

    Attributes
    ----------
    n_scored : images so far
    color_range : as given, or as found once the overlays are drawn

    Raises
    ------
    OSError
        The folder or a file in it cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        inputs: dict[str, Path],
        *,
        maps: bool,
        overlays: bool,
        color_range: tuple[float, float] | None = None,
        progress: bool | None = None,
    ) -> None:
        self.n_scored = 0
        self.color_range = color_range
        self._scores_so_far = folder / _partial(SCORES[0])
        self._folder = folder
        self._inputs = inputs
        self._maps, self._overlays = maps, overlays
        self._progress = progress
        self._pictures: set[Path] = set()  # folders that pictures have been written into

    def __enter__(self) -> PredictionFiles:
        self._folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            self._csv, self._jsonl = (
                stack.enter_context(
                    # Names of files are bytes: what is no text goes out as it came in.
                    Path(self._folder, _partial(name)).open(
                        "w", encoding="utf-8", errors="surrogateescape", newline=""
                    )
                )
                for name in SCORES
            )
            self._spool: _Spool | None = None
            if self._overlays and self.color_range is None:
                self._spool = stack.enter_context(_Spool(self._folder, len(self._inputs)))
            self._files = stack.pop_all()
        self._rows = csv.writer(self._csv, lineterminator="\n")
        self._rows.writerow(("path", "score"))
        return self

    def add(self, prediction: Prediction) -> None:
        """Write the rows and pictures of a few images.

        Parameters
        ----------
        prediction : with maps at the model's size, and with images if there are overlays
        """
        nothing: list[NDArray[Any] | None] = [None] * len(prediction.paths)
        images = prediction.images if self._overlays else nothing
        for path, score, map_, size, image in zip(
            prediction.paths,
            prediction.scores,
            prediction.maps,
            prediction.sizes,
            images,
            strict=True,
        ):
            row: dict[str, Any] = {"path": path, "score": float(score), "size": list(size)}
            if self._maps:
                row["map"] = self._name(MAPS, path)
                self._save(Image.fromarray(_at(map_, size)), row["map"], "TIFF")
            if image is not None:
                row["overlay"] = self._name(OVERLAYS, path)
                if self._spool is None:
                    self._draw(path, image, map_)
                else:
                    self._spool.put(path, eight_bit(image), map_)
            with naming(self._scores_so_far):
                self._rows.writerow((path, repr(row["score"])))
                self._jsonl.write(json.dumps(row) + "\n")
        with naming(self._scores_so_far):
            self._csv.flush()
            self._jsonl.flush()
        self.n_scored += len(prediction.paths)

    def finish(self) -> None:
        """Give the scores their final name, then draw the overlays that waited for the colours."""
        for file, name in zip((self._csv, self._jsonl), SCORES, strict=True):
            partial = self._folder / _partial(name)
            with naming(partial):
                file.flush()
                os.fsync(file.fileno())
                partial.replace(self._folder / name)
        if self._spool is not None:
            self.color_range = self._spool.color_range()
            waiting = track(self._spool, "overlays", self.n_scored, self._progress, "images")
            for path, image, map_ in waiting:
                self._draw(path, image, map_)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with suppress(OSError) if error else nullcontext():  # a full disk was reported already
            self._files.close()
        if not self.n_scored:
            for name in SCORES:
                (self._folder / _partial(name)).unlink(missing_ok=True)

    def _draw(self, path: str, image: NDArray[Any], map_: NDArray[np.float32]) -> None:
        assert self.color_range is not None
        low, high = self.color_range
        heat = (_at(map_, image.shape[:2]) - low) / (high - low)
        self._save(Image.fromarray(draw_overlay(image, heat)), self._name(OVERLAYS, path), "PNG")

    def _name(self, part: str, path: str) -> str:
        """Path below the folder. The image's own suffix stays, so that a.jpg and a.png differ."""
        return f"{part}/{self._inputs[path].as_posix()}{'.tiff' if part == MAPS else '.png'}"

    def _save(self, picture: Image.Image, name: str, kind: str) -> None:
        """Whole or not at all. The disk is not waited for: pictures can be made again."""
        buffer = io.BytesIO()
        picture.save(buffer, kind, **({"compress_level": 1} if kind == "PNG" else {}))
        target = self._folder / name
        if target.parent not in self._pictures:
            target.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(target.parent)
            self._pictures.add(target.parent)
        with replacing(target, one_of_many=True) as file:
            file.write(buffer.getbuffer())


class _Spool:
    """Pixels and maps on the disk until the colours are known, and a sample of the maps' values.

    Iterating gives everything back in order. The file has no name: nothing can be left behind.

    Parameters
    ----------
    folder : where the file is
    n_images : how many will come, at most
    """

    def __init__(self, folder: Path, n_images: int) -> None:
        self._folder = folder
        self._per_map = max(1, _SAMPLE // n_images)
        self._random = np.random.default_rng(0)
        self._sample: list[NDArray[np.float32]] = []
        self._shapes: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = []

    def __enter__(self) -> _Spool:
        with naming(self._folder):
            self._file: IO[bytes] = tempfile.TemporaryFile(dir=self._folder)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def put(self, path: str, image: NDArray[np.uint8], map_: NDArray[np.float32]) -> None:
        values = map_.ravel()
        if len(values) > self._per_map:  # a regular step could meet the same columns in every row
            values = self._random.choice(values, self._per_map)
        self._sample.append(values.copy())
        self._shapes.append((path, image.shape, map_.shape))
        with naming(self._folder):
            for array in (image, map_):
                self._file.write(np.ascontiguousarray(array).data)

    def color_range(self) -> tuple[float, float]:
        """Median and 99.9th percentile of the maps, which differ."""
        low, high = np.quantile(np.concatenate(self._sample), (0.5, 0.999)).tolist()
        return low, max(high, float(np.nextafter(np.float32(low), np.inf)))

    def __iter__(self) -> Iterator[Waiting]:
        with naming(self._folder):
            self._file.seek(0)  # what is not on the disk yet is written before
        for path, of_image, of_map in self._shapes:
            yield path, self._take(np.uint8, of_image), self._take(np.float32, of_map)

    def _take(self, dtype: Any, shape: tuple[int, ...]) -> NDArray[Any]:
        array = np.empty(shape, dtype)
        self._file.readinto(array)  # type: ignore[attr-defined]
        return array


def _at(map_: NDArray[np.float32], size: tuple[int, ...]) -> NDArray[np.float32]:
    """A map at the size (height, width) of its image."""
    (own,) = resized(torch.from_numpy(map_)[None], [(size[0], size[1])])
    return own


def _partial(name: str) -> str:
    stem, suffix = name.split(".")
    return f"{stem}.partial.{suffix}"
