"""What `npad predict` leaves in its folder: scores, regions, maps, masks and overlays.

Rows of scores are written as they come; `npad/cli/score_tables.py` says under which names. Every
picture appears whole or not at all.

The colour scale of the overlays is that of the whole run. Unless it is given, it is known at the end
only; until then pixels and maps wait on the disk, in a file that has no name.
"""

from __future__ import annotations

import hashlib
import math
import os
import struct
import tempfile
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from npad.cli.score_tables import ScoreTables
from npad.evaluation.overlay import draw_overlay, eight_bit
from npad.images.errors import ImageError
from npad.images.folders import OUTPUT_MARK, find_images
from npad.progress import track
from npad.scoring.decisions import Decisions
from npad.scoring.fusion import inside_alone, resized, with_shares
from npad.scoring.prediction import Prediction
from npad.scoring.regions import find_regions

__all__ = ["PredictionFiles", "alike", "find_inputs", "named"]

OVERLAYS, MAPS, MASKS = "overlays", "maps", "masks"
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
        picture = named(picture, alike(picture) in taken)
        taken.add(alike(picture))
        inputs[spelled] = picture
        longest = os.fsencode(_absolute(folder) / OVERLAYS / picture)
        if len(longest) + _ROOM > _LONGEST_PATH:
            raise ImageError(
                spelled, "the path of its picture would be too long: give a shorter --output"
            )
    return inputs


def alike(picture: Path) -> str:
    """One text for all paths that are one on some disk."""
    return unicodedata.normalize("NFC", str(picture).casefold())


def named(picture: Path, told_apart: bool) -> Path:
    """A path, ending in a hash of it where it must be told apart or is too long for what follows."""
    if not told_apart and len(os.fsencode(picture.name)) + _ROOM <= _LONGEST_NAME:
        return picture
    digest = hashlib.sha256(os.fsencode(picture)).hexdigest()[:8]
    room = _LONGEST_NAME - _ROOM - len(f"~{digest}")
    return picture.with_name(f"{os.fsencode(picture.name)[:room].decode(errors='ignore')}~{digest}")


def _absolute(path: Path) -> Path:
    """Without following links: an image that is linked twice has two names."""
    return Path(os.path.abspath(path))  # noqa: PTH100


class PredictionFiles:
    """Writer of the output folder; as a context manager it closes what it has opened.

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
    tables : into which rows are written; by default those of a run that ends
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
        inputs: Mapping[str, Path],
        *,
        maps: bool,
        overlays: bool,
        decided: bool = False,
        masks: bool = False,
        color_range: tuple[float, float] | None = None,
        tables: ScoreTables | None = None,
        progress: bool | None = None,
    ) -> None:
        self.n_scored = self.n_unaligned = self.n_anomalous = 0
        self.color_range = color_range
        self._folder = folder
        self._inputs = inputs
        self._maps, self._overlays, self._masks = maps, overlays, masks
        self._decided = decided
        self._tables = ScoreTables(folder, decided=decided) if tables is None else tables
        self._progress = progress
        self._pictures: set[Path] = set()  # folders that pictures have been written into

    def __enter__(self) -> PredictionFiles:
        self._folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            stack.enter_context(self._tables)
            self._spool: _Spool | None = None
            if self._overlays and self.color_range is None:
                self._spool = stack.enter_context(_Spool(self._folder, len(self._inputs)))
            self._opened = stack.pop_all()
        return self

    def add(
        self, prediction: Prediction, more: Mapping[str, Mapping[str, Any]] | None = None
    ) -> None:
        """Write the rows and pictures of a few images.

        Parameters
        ----------
        prediction : with maps at the model's size, and with images if there are overlays
        more : by its path, what else the row of an image says; images that it lacks are left out
        """
        unaligned = dict(prediction.unaligned)
        for i, (path, map_, size) in enumerate(
            zip(prediction.paths, prediction.maps, prediction.sizes, strict=True)
        ):
            if more is not None and path not in more:
                continue
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
            self._tables.write(row | dict(more[path] if more else {}))
            self.n_scored += 1
            self.n_unaligned += path in unaligned
        self._tables.flush()

    def finish(self) -> None:
        """Give the tables their final names, then draw the overlays that waited for the colours."""
        self._tables.finish()
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
            self._opened.__exit__(kind, error, trace)

    def _draw(
        self, path: str, image: NDArray[Any], map_: NDArray[np.float32], threshold: float
    ) -> None:
        assert self.color_range is not None
        low, high = self.color_range
        picture = Image.new("RGB", (image.shape[1], image.shape[0]))
        for rows, values in _bands(map_, image.shape):
            band = draw_overlay(image[rows], np.nan_to_num((values - low) / (high - low)))
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
        values = map_[~np.isnan(map_)]  # outside a region of interest
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
    in_part = bool(np.isnan(map_).any())
    whole = torch.from_numpy(map_)[None]
    maps = torch.cat(with_shares(whole)) if in_part else whole
    tall = resized(maps, [(size[0], map_.shape[1])] * len(maps))
    for rows in _rows(size):
        part = torch.from_numpy(np.stack([x[rows] for x in tall]))
        bands = resized(part, [(rows.stop - rows.start, size[1])] * len(maps))
        yield rows, inside_alone(*map(torch.from_numpy, bands)).numpy() if in_part else bands[0]


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
