"""What `npad predict` leaves in its folder: scores, regions, maps, masks and overlays.

Rows of scores are written as they come, under a name that says "partial", and get their own name
once every image is scored. Every picture appears whole or not at all.

The colour scale of the overlays is that of the whole run. Unless it is given, it is known at the end
only; until then pixels and maps wait on the disk, in a file that has no name.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import struct
import tempfile
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import IO, Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from npad.atomic_file import naming, remove_leftovers, replacing
from npad.evaluation.overlay import draw_overlay, eight_bit
from npad.images.errors import ImageError
from npad.images.folders import OUTPUT_MARK, find_images
from npad.progress import track
from npad.scoring.decisions import Decisions
from npad.scoring.fusion import resized
from npad.scoring.prediction import Prediction
from npad.scoring.regions import find_regions

__all__ = ["PredictionFiles", "find_inputs"]

SCORES = ("scores.csv", "scores.jsonl")
REGIONS = "regions.csv"
OVERLAYS, MAPS, MASKS = "overlays", "maps", "masks"
COLUMNS = ("path", "score")
DECISION_COLUMNS = ("p_value", "threshold", "anomalous", "n_regions")
REGION_COLUMNS = ("path", "left", "top", "width", "height", "area", "peak", "peak_x", "peak_y")
OUTLINE = (90, 220, 255)  # of regions, on overlays
_SAMPLE = 1 << 21  # values of all maps, from which the ends of the colour scale are taken
_BAND = 1 << 20  # pixels of a large image that are drawn at once
_LONGEST_NAME, _LONGEST_PATH = 255, 4095  # bytes that Linux takes
_ROOM = len(".tiff")  # that is put behind an image's name

Waiting = tuple[
    str, NDArray[np.uint8], NDArray[np.float32], float
]  # path, pixels, map, its threshold


def find_inputs(paths: Sequence[Path], folder: Path) -> dict[str, Path]:
    """Images to score, each once, and where its pictures go.

    Parameters
    ----------
    paths : files, and folders that are searched for images
    folder : of the output

    Returns
    -------
    dict from the image's path to its path below the deepest folder that holds all of ``paths``.
    A file name that is too long for what is put behind it is cut, and one that differs from another's
    in capitals or in the form of its accents alone is told apart, as not every disk tells them apart:
    both by ``~`` and eight digits of their hash.

    Raises
    ------
    ImageError
        A folder holds no images, or a picture's path would be longer than the system takes.
    """
    base = os.path.commonpath([_absolute(p if p.is_dir() else p.parent) for p in paths])
    found: dict[Path, str] = {}
    for path in paths:
        images = find_images(path) if path.is_dir() else [path]
        absolute = {_absolute(image): str(image) for image in images}
        found = absolute | found  # the first spelling of a path stays
    ordered = sorted(found.items()) if len(paths) > 1 else list(found.items())
    inputs: dict[str, Path] = {}
    taken: set[str] = set()
    for absolute_path, spelled in ordered:
        picture = absolute_path.relative_to(base)
        if _alike(picture) in taken or len(os.fsencode(picture.name)) + _ROOM > _LONGEST_NAME:
            picture = picture.with_name(_short(picture))
        taken.add(_alike(picture))
        inputs[spelled] = picture
        longest = os.fsencode(_absolute(folder) / OVERLAYS / picture)
        if len(longest) + _ROOM > _LONGEST_PATH:
            raise ImageError(
                spelled, "the path of its picture would be too long: give a shorter --output"
            )
    return inputs


def _alike(picture: Path) -> str:
    """One text for all paths that are one on some disk."""
    return unicodedata.normalize("NFC", str(picture).casefold())


def _short(picture: Path) -> str:
    digest = hashlib.sha256(os.fsencode(picture)).hexdigest()[:8]
    room = _LONGEST_NAME - _ROOM - len(f"~{digest}")
    return f"{os.fsencode(picture.name)[:room].decode(errors='ignore')}~{digest}"


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
    decided : whether predictions come with decisions, which are written too
    masks : whether to write the masks of such
    color_range : map values at the ends of the overlays' colour scale. None takes the median and
        the 99.9th percentile of all maps of the run: then overlays are drawn at the end, and until
        then the folder's disk holds three bytes for each pixel of the images and four for each pixel
        of the maps at the model's size.
    progress : as for `npad.progress.task`

    Attributes
    ----------
    n_scored : images so far
    n_unaligned : how many of them that could not be registered to the model's template
    n_anomalous : how many of them are anomalous, where that is decided
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
        decided: bool = False,
        masks: bool = False,
        color_range: tuple[float, float] | None = None,
        progress: bool | None = None,
    ) -> None:
        self.n_scored = self.n_unaligned = self.n_anomalous = 0
        self.color_range = color_range
        self._scores_so_far = folder / _partial_name(SCORES[0])
        self._folder = folder
        self._inputs = inputs
        self._maps, self._overlays, self._masks = maps, overlays, masks
        self._names = (*SCORES, REGIONS) if decided else SCORES
        self._decided = decided
        self._progress = progress
        self._pictures: set[Path] = set()  # folders that pictures have been written into

    def __enter__(self) -> PredictionFiles:
        self._folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            self._tables = [
                stack.enter_context(
                    # Names of files are bytes: what is no text goes out as it came in.
                    Path(self._folder, _partial_name(name)).open(
                        "w", encoding="utf-8", errors="surrogateescape", newline=""
                    )
                )
                for name in self._names
            ]
            self._spool: _Spool | None = None
            if self._overlays and self.color_range is None:
                self._spool = stack.enter_context(_Spool(self._folder, len(self._inputs)))
            self._files = stack.pop_all()
        scores, self._jsonl, *regions = self._tables
        self._rows, *self._region_rows = (
            csv.writer(table, lineterminator="\n") for table in (scores, *regions)
        )
        self._rows.writerow((*COLUMNS, *(DECISION_COLUMNS if self._decided else ())))
        for rows in self._region_rows:
            rows.writerow(REGION_COLUMNS)
        return self

    def add(self, prediction: Prediction) -> None:
        """Write the rows and pictures of a few images.

        Parameters
        ----------
        prediction : with maps at the model's size, and with images if there are overlays
        """
        unaligned = dict(prediction.unaligned)
        for i, (path, map_, size) in enumerate(
            zip(prediction.paths, prediction.maps, prediction.sizes, strict=True)
        ):
            row: dict[str, Any] = {"path": path, "score": float(prediction.scores[i])}
            row["size"] = list(size)
            if path in unaligned:
                row["unaligned"] = unaligned[path]
            threshold = math.inf
            if self._decided:
                assert prediction.decisions is not None
                threshold = float(prediction.decisions.map_thresholds[i])
                row |= _decision(prediction.decisions, i, row["score"])
                self.n_anomalous += row["anomalous"]
                found = find_regions(map_, threshold, size)
                row["regions"] = [region.to_json() for region in found]
            if self._maps:
                row["map"] = self._name(MAPS, path)
                self._save(row["map"], partial(_write_map, map_, size))
            if self._masks:
                row["mask"] = self._name(MASKS, path)
                self._save(row["mask"], partial(_write_mask, map_, size, threshold))
            if self._overlays:
                row["overlay"] = self._name(OVERLAYS, path)
                waiting = path, prediction.images[i], map_, threshold
                if self._spool is None:
                    self._draw(*waiting)
                else:
                    self._spool.put(*waiting)
            with naming(self._scores_so_far):
                self._write(row)
        with naming(self._scores_so_far):
            for table in self._tables:
                table.flush()
        self.n_scored += len(prediction.paths)
        self.n_unaligned += len(prediction.unaligned)

    def _write(self, row: dict[str, Any]) -> None:
        values = [row["path"], repr(row["score"])]
        if self._decided:
            values += [repr(row["p_value"]), repr(row["threshold"]), str(int(row["anomalous"]))]
            values.append(str(len(row["regions"])))
            for region in row["regions"]:
                place = (*region["box"], region["area"], repr(region["peak"]), *region["peak_at"])
                self._region_rows[0].writerow((row["path"], *place))
        self._rows.writerow(values)
        self._jsonl.write(json.dumps(row) + "\n")

    def finish(self) -> None:
        """Give the scores their final name, then draw the overlays that waited for the colours."""
        for file, name in zip(self._tables, self._names, strict=True):
            so_far = self._folder / _partial_name(name)
            with naming(so_far):
                file.flush()
                os.fsync(file.fileno())
                so_far.replace(self._folder / name)
        if self._spool is not None:
            self.color_range = self._spool.color_range()
            waiting = track(self._spool, "overlays", self.n_scored, self._progress, "images")
            for path, image, map_, threshold in waiting:
                self._draw(path, image, map_, threshold)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with suppress(OSError) if error else nullcontext():  # a full disk was reported already
            self._files.close()
        if not self.n_scored:
            for name in self._names:
                (self._folder / _partial_name(name)).unlink(missing_ok=True)

    def _draw(
        self, path: str, image: NDArray[Any], map_: NDArray[np.float32], threshold: float
    ) -> None:
        assert self.color_range is not None
        low, high = self.color_range
        picture = Image.new("RGB", (image.shape[1], image.shape[0]))
        for rows, values in _bands(map_, image.shape):
            band = draw_overlay(image[rows], (values - low) / (high - low))
            mask = values > threshold
            if mask.any():
                band[mask & ~ndimage.binary_erosion(mask, iterations=2, border_value=1)] = OUTLINE
            picture.paste(Image.fromarray(band), (0, rows.start))
        save = partial(picture.save, format="PNG", compress_level=1)
        self._save(self._name(OVERLAYS, path), save)

    def _name(self, part: str, path: str) -> str:
        """Path below the folder. The image's own suffix stays, so that a.jpg and a.png differ."""
        return f"{part}/{self._inputs[path].as_posix()}{'.tiff' if part == MAPS else '.png'}"

    def _save(self, name: str, write: Callable[[BinaryIO], None]) -> None:
        """Whole or not at all. The disk is not waited for: pictures can be made again."""
        target = self._folder / name
        if target.parent not in self._pictures:
            target.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(target.parent)
            (self._folder / Path(name).parts[0] / OUTPUT_MARK).touch()
            self._pictures.add(target.parent)
        with replacing(target, one_of_many=True) as file:
            write(file)


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
        self._shapes: list[tuple[str, tuple[int, ...], tuple[int, ...], float]] = []

    def __enter__(self) -> _Spool:
        with naming(self._folder):
            self._file: IO[bytes] = tempfile.TemporaryFile(dir=self._folder)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def put(
        self, path: str, image: NDArray[Any], map_: NDArray[np.float32], threshold: float
    ) -> None:
        values = map_.ravel()
        if len(values) > self._per_map:  # a regular step could meet the same columns in every row
            values = self._random.choice(values, self._per_map)
        self._sample.append(values.copy())
        self._shapes.append((path, image.shape, map_.shape, threshold))
        with naming(self._folder):
            for rows in _rows(image.shape):
                self._file.write(np.ascontiguousarray(eight_bit(image[rows])).data)
            self._file.write(np.ascontiguousarray(map_).data)

    def color_range(self) -> tuple[float, float]:
        """Median and 99.9th percentile of the maps, which differ."""
        low, high = np.quantile(np.concatenate(self._sample), (0.5, 0.999)).tolist()
        return low, max(high, float(np.nextafter(np.float32(low), np.inf)))

    def __iter__(self) -> Iterator[Waiting]:
        with naming(self._folder):
            self._file.seek(0)  # what is not on the disk yet is written before
        for path, of_image, of_map, threshold in self._shapes:
            pixels = self._take(np.uint8, of_image)
            yield path, pixels, self._take(np.float32, of_map), threshold

    def _take(self, dtype: Any, shape: tuple[int, ...]) -> NDArray[Any]:
        array = np.empty(shape, dtype)
        self._file.readinto(array)  # type: ignore[attr-defined]
        return array


def _rows(size: tuple[int, ...]) -> Iterator[slice]:
    """The rows of an image of this (height, width, ...), some at a time."""
    step = max(1, _BAND // size[1])
    return (slice(top, min(top + step, size[0])) for top in range(0, size[0], step))


def _bands(
    map_: NDArray[np.float32], size: tuple[int, ...]
) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    """A map at the size (height, width) of its image, some rows at a time.

    Bit for bit as if resized at once: columns are interpolated after rows, which are exact by then.
    """
    (tall,) = resized(torch.from_numpy(map_)[None], [(size[0], map_.shape[1])])
    for rows in _rows(size):
        (band,) = resized(torch.from_numpy(tall[rows])[None], [(rows.stop - rows.start, size[1])])
        yield rows, band


def _write_map(map_: NDArray[np.float32], size: tuple[int, int], file: BinaryIO) -> None:
    """A TIFF of one strip of float32, little endian."""
    height, width = size
    tags = {256: width, 257: height, 258: 32, 259: 1, 262: 1, 273: 0, 277: 1, 278: height}
    tags |= {279: 4 * height * width, 339: 3}  # sizes, no compression, black is zero, floats
    tags[273] = 8 + 2 + 12 * len(tags) + 4  # where the strip begins
    if tags[273] + tags[279] >= 1 << 32:
        raise ValueError(f"a map of {width} x {height} is too large for TIFF: leave out --maps")
    file.write(struct.pack("<2sHIH", b"II", 42, 8, len(tags)))
    for tag, value in tags.items():
        file.write(struct.pack("<HHII", tag, 3 if value < 1 << 16 else 4, 1, value))
    file.write(struct.pack("<I", 0))
    for _, band in _bands(map_, size):
        file.write(band.astype("<f4", copy=False).data)


def _write_mask(
    map_: NDArray[np.float32], size: tuple[int, int], threshold: float, file: BinaryIO
) -> None:
    """A PNG of one bit: white where the map is above its threshold."""
    picture = Image.new("1", (size[1], size[0]))
    for rows, values in _bands(map_, size):
        picture.paste(Image.fromarray(values > threshold), (0, rows.start))
    picture.save(file, format="PNG")


def _decision(decisions: Decisions, i: int, score: float) -> dict[str, Any]:
    """What is decided about image i."""
    threshold = float(decisions.thresholds[i])
    return {
        "p_value": float(decisions.p_values[i]),
        "threshold": threshold,
        "map_threshold": float(decisions.map_thresholds[i]),
        "anomalous": score > threshold,
    }


def _partial_name(name: str) -> str:
    stem, suffix = name.split(".")
    return f"{stem}.partial.{suffix}"
