"""What `npad predict` leaves in its folder: scores, maps and overlays.

Rows of scores are written as they come, under a name that says "partial", and get their own name
once every image is scored. Every picture appears whole or not at all.
"""

from __future__ import annotations

import csv
import io
import json
import os
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from npad.atomic_file import naming
from npad.evaluation.overlay import draw_overlay
from npad.images.source import ImageError, list_images, read_image
from npad.progress import track
from npad.scoring.fusion import resized

if TYPE_CHECKING:
    from npad.detector import Prediction

__all__ = ["PredictionFiles", "find_inputs"]

SCORES = ("scores.csv", "scores.jsonl")
OVERLAYS, MAPS = "overlays", "maps"
_SKETCH = (64, 64)  # a map is kept at this size until its overlay is drawn: it is smooth
_SAMPLE = 1 << 21  # values of all maps, from which the ends of the colour scale are taken


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
    color_range : map values at the ends of the overlays' colour scale; None takes the median and
        the 99.9th percentile of all maps of the run
    progress : as for `npad.progress.task`

    Attributes
    ----------
    n_scored : images so far
    color_range : as given, or as found once the overlays are drawn
    partial : the file that holds the scores so far

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
        self.partial = folder / _partial(SCORES[0])
        self._folder = folder
        self._inputs = inputs
        self._maps, self._overlays = maps, overlays
        self._progress = progress
        self._drawn: list[str] = []

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
            # It has no name, so that nothing can be left behind.
            self._sketches: IO[bytes] = stack.enter_context(
                tempfile.TemporaryFile(dir=self._folder)
            )
            self._files = stack.pop_all()
        self._rows = csv.writer(self._csv, lineterminator="\n")
        self._rows.writerow(("path", "score"))
        return self

    def add(self, prediction: Prediction) -> None:
        """Write the rows and maps of a few images."""
        for path, score, map_ in zip(
            prediction.paths, prediction.scores, prediction.maps, strict=True
        ):
            row = {"path": path, "score": float(score), "size": list(map_.shape)}
            if self._maps:
                row["map"] = self._name(MAPS, path)
                self._save(Image.fromarray(map_), self._name(MAPS, path), "TIFF")
            if self._overlays:
                row["overlay"] = self._name(OVERLAYS, path)
                (sketch,) = resized(torch.from_numpy(map_)[None], [_SKETCH])
                with naming(self._folder):
                    self._sketches.write(np.ascontiguousarray(sketch, dtype=np.float32).tobytes())
                self._drawn.append(path)
            with naming(self.partial):
                self._rows.writerow((path, repr(row["score"])))
                self._jsonl.write(json.dumps(row) + "\n")
        with naming(self.partial):
            self._csv.flush()
            self._jsonl.flush()
        self.n_scored += len(prediction.paths)

    def finish(self) -> None:
        """Give the scores their final name, then draw the overlays."""
        for file, name in zip((self._csv, self._jsonl), SCORES, strict=True):
            partial = self._folder / _partial(name)
            with naming(partial):
                file.flush()
                os.fsync(file.fileno())
                partial.replace(self._folder / name)
        if self._drawn:
            self._draw()

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

    def _draw(self) -> None:
        self._sketches.flush()
        shape = (len(self._drawn), *_SKETCH)
        sketches = np.memmap(self._sketches, np.float32, "r", shape=shape)
        if self.color_range is None:
            values = sketches.reshape(-1)[:: -(-sketches.size // _SAMPLE)]
            low, high = (float(level) for level in np.quantile(values, (0.5, 0.999)))
            self.color_range = low, max(high, float(np.nextafter(np.float32(low), np.inf)))
        low, high = self.color_range
        rows = zip(self._drawn, sketches, strict=True)
        for path, sketch in track(rows, "overlays", len(self._drawn), self._progress, "images"):
            image = read_image(path)
            scaled = torch.from_numpy((sketch - low) / (high - low))
            (heat,) = resized(scaled[None], [image.shape[:2]])
            picture: NDArray[np.uint8] = draw_overlay(image, heat)
            self._save(Image.fromarray(picture), self._name(OVERLAYS, path), "PNG")

    def _name(self, part: str, path: str) -> str:
        """Path below the folder. The image's own suffix stays, so that a.jpg and a.png differ."""
        return f"{part}/{self._inputs[path].as_posix()}{'.tiff' if part == MAPS else '.png'}"

    def _save(self, picture: Image.Image, name: str, kind: str) -> None:
        """Whole or not at all. The disk is not waited for: pictures can be made again."""
        buffer = io.BytesIO()
        picture.save(buffer, kind, **({"compress_level": 1} if kind == "PNG" else {}))
        target = self._folder / name
        with naming(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.parent / f".npad-{os.getpid()}.tmp"
            try:
                temporary.write_bytes(buffer.getbuffer())
                temporary.replace(target)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise


def _partial(name: str) -> str:
    stem, suffix = name.split(".")
    return f"{stem}.partial.{suffix}"
