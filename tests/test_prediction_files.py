"""The folder of `npad predict`: colours, pictures, what waits on the disk, several runs at once."""

from __future__ import annotations

import json
import os
import tempfile
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
import tifffile
import torch
from command_line import SMALL, disk_of, fail, succeed
from image_files import save_image, smooth_pixels
from PIL import Image

from npad import NPad, ops
from npad.cli import prediction_files
from npad.cli.prediction_files import PredictionFiles, find_inputs
from npad.evaluation.overlay import draw_overlay
from npad.images import decoding, read_image
from npad.images.folders import OUTPUT_MARK
from npad.scoring.prediction import Prediction

Pixels = np.ndarray


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of several sizes and kinds; one lies on its side."""
    root = tmp_path_factory.mktemp("images")
    save_image(root / "colour.png", smooth_pixels(64, 64))
    save_image(root / "wide.png", smooth_pixels(50, 90, seed=1))
    save_image(root / "grey.png", smooth_pixels(70, 40, seed=2)[..., 0])
    save_image(root / "deep.png", np.uint16(257) * smooth_pixels(33, 47, seed=3)[..., 0])
    exif = Image.Exif()
    exif[0x0112] = 6
    save_image(root / "below/turned.jpg", smooth_pixels(40, 60, seed=4), exif=exif)
    return root


@pytest.fixture(scope="module")
def model(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "part.npad"
    succeed("fit", images, "-o", path, *SMALL)
    return path


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]


def names(folder: Path) -> set[str]:
    """Of all files but the mark of npad's own folders."""
    return {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and path.name != OUTPUT_MARK
    }


def read(path: Path) -> Pixels:
    return np.asarray(Image.open(path))


def heat_at(map_: Pixels, size: tuple[int, int], low: float, high: float) -> Pixels:
    return (ops.resize_maps(torch.from_numpy(map_)[None], [size]).view(size).numpy() - low) / (
        high - low
    )


@pytest.mark.parametrize("band", [1, 300, prediction_files._BAND])  # rows at once: 1, some, all
def test_pictures_are_made_of_the_models_maps_and_the_images(
    band: int, images: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prediction_files, "_BAND", band)
    succeed("predict", model, images, "-o", tmp_path, "--maps")
    fitted = NPad.load(model)
    own, at_images = fitted.predict(images, map_size="model"), fitted.predict(images)
    low, high = np.quantile(np.stack(own.maps), (0.5, 0.999)).tolist()
    found = rows(tmp_path)
    assert [row["path"] for row in found] == own.paths
    for row, map_, map_at_image in zip(found, own.maps, at_images.maps, strict=True):
        image = read_image(row["path"])
        assert row["size"] == list(image.shape[:2])
        assert np.array_equal(read(tmp_path / row["map"]), map_at_image)
        expected = draw_overlay(image, heat_at(map_, image.shape[:2], low, high))
        assert np.array_equal(read(tmp_path / row["overlay"]), expected)


def test_colours_that_are_given_and_colours_that_are_found(
    images: Path, model: Path, tmp_path: Path
) -> None:
    fitted = NPad.load(model)
    parts = list(fitted.predict_batches(images, map_size="model", keep_images=True))
    inputs = find_inputs([images], tmp_path)

    def write(folder: Path, color_range: tuple[float, float] | None) -> tuple[float, float]:
        files = PredictionFiles(
            folder, inputs, maps=False, overlays=True, color_range=color_range, progress=False
        )
        with files:
            for part in parts:
                files.add(part)
            drawn = len(names(folder / "overlays"))
            assert drawn == (0 if color_range is None else len(inputs))
            files.finish()
        assert files.color_range is not None
        return files.color_range

    found = write(tmp_path / "found", None)
    assert write(tmp_path / "given", found) == found
    assert names(tmp_path / "given") == names(tmp_path / "found")
    for name in names(tmp_path / "given"):
        assert (tmp_path / "given" / name).read_bytes() == (tmp_path / "found" / name).read_bytes()


@pytest.mark.parametrize(
    ("options", "kept", "spooled"),
    [
        ((), True, True),
        (("--color-range", "0,1"), True, False),
        (("--no-overlays", "--maps"), False, False),
    ],
)
def test_each_image_is_decoded_once_and_no_more_is_kept_than_is_drawn(
    options: tuple[str, ...],
    kept: bool,
    spooled: bool,
    images: Path,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened: Counter[str] = Counter()
    find_reader, add = decoding.find_reader, PredictionFiles.add
    make_file = tempfile.TemporaryFile
    seen, made = [], []

    def count(file: BinaryIO, name: str) -> Any:
        opened[name] += 1
        return find_reader(file, name)

    def look(self: PredictionFiles, prediction: Prediction) -> None:
        seen.append(len(prediction.images))
        add(self, prediction)

    def make(**where: Any) -> Any:
        made.append(where)
        return make_file(**where)

    monkeypatch.setattr(decoding, "find_reader", count)
    monkeypatch.setattr(PredictionFiles, "add", look)
    monkeypatch.setattr(tempfile, "TemporaryFile", make)
    succeed("predict", model, images, "-o", tmp_path, *options)
    monkeypatch.undo()
    assert opened == Counter({row["path"]: 1 for row in rows(tmp_path)})
    assert sum(seen) == (5 if kept else 0)
    assert made == ([{"dir": tmp_path}] if spooled else [])
    assert len(names(tmp_path / "overlays")) == (5 if kept else 0)


def test_colours_of_a_run_of_many_maps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ends are estimated from a sample, in which no column is missing."""
    monkeypatch.setattr(prediction_files, "_SAMPLE", 1 << 15)
    paths = [f"{i}.png" for i in range(256)]
    stripes = np.tile(np.linspace(0, 1, 128, dtype=np.float32), (128, 1))
    image = np.zeros((2, 2, 3), np.uint8)
    files = PredictionFiles(
        tmp_path, {path: Path(path) for path in paths}, maps=False, overlays=True, progress=False
    )
    with files:
        for path in paths:
            one = Prediction(np.ones(1), [stripes], [path], sizes=[(2, 2)], images=[image])
            files.add(one)
        files.finish()
    assert files.color_range == pytest.approx((0.5, 0.999), abs=0.02)
    assert len(names(tmp_path / "overlays")) == len(paths)


def test_maps_that_are_all_alike(tmp_path: Path) -> None:
    one = Prediction(
        np.ones(1), [np.ones((4, 4), np.float32)], ["a"], sizes=[(2, 2)],
        images=[np.full((2, 2, 3), 7, np.uint8)],
    )  # fmt: skip
    files = PredictionFiles(tmp_path, {"a": Path("a")}, maps=False, overlays=True, progress=False)
    with files:
        files.add(one)
        files.finish()
    assert (read(tmp_path / "overlays/a.png") == 7).all()


def test_a_disk_that_is_full_of_what_waits(images: Path, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    one_by_one = ("predict", model, images, "-o", out, "--batch-size", "1")
    with disk_of(70_000):  # holds one image and its map
        fail(1, *one_by_one, says=[f"npad: error: {out}: ", "too large", "the space on its disk"])
    assert names(out) == {"scores.partial.csv", "scores.partial.jsonl"}
    kept = (out / "scores.partial.csv").read_text().splitlines()
    assert 2 <= len(kept) < 1 + 5
    assert kept[0] == "path,score"


def pictures(folder: Path, value: int) -> tuple[PredictionFiles, Prediction]:
    """A run that draws one image all of one grey."""
    files = PredictionFiles(
        folder, {"a": Path("a")}, maps=False, overlays=True, color_range=(1, 2), progress=False
    )
    image = np.full((2, 2, 3), value, np.uint8)
    map_ = np.zeros((4, 4), np.float32)
    return files, Prediction(np.zeros(1), [map_], ["a"], sizes=[(2, 2)], images=[image])


def test_two_runs_into_one_folder_leave_each_others_pictures_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second comes, and goes, while the first is about to give its picture the final name.

    Both have one process number, as runs in two containers may have.
    """
    replace = Path.replace

    def interfere(self: Path, target: Path) -> Path:
        if "overlays" in str(target):
            monkeypatch.setattr(Path, "replace", replace)
            files, prediction = pictures(tmp_path, 50)
            with files:
                files.add(prediction)
            assert (read(tmp_path / "overlays/a.png") == 50).all()
            during = names(tmp_path / "overlays")
            assert len(during) == 2  # the other one's is there still
        return replace(self, target)

    files, prediction = pictures(tmp_path, 200)
    monkeypatch.setattr(Path, "replace", interfere)
    with files:
        files.add(prediction)
    assert (read(tmp_path / "overlays/a.png") == 200).all()
    assert names(tmp_path / "overlays") == {"a.png"}


def failing(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("broken", ["replace", "unlink"])
def test_nothing_is_left_in_the_folder_of_pictures(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an interrupt; and after a kill, once the next run comes."""
    files, prediction = pictures(tmp_path, 50)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", failing)
        if broken == "unlink":  # as if killed: nobody tidies up
            patch.setattr(Path, "unlink", failing)
        with pytest.raises(KeyboardInterrupt), files:
            files.add(prediction)
    left = names(tmp_path / "overlays")
    assert len(left) == (1 if broken == "unlink" else 0)
    files, prediction = pictures(tmp_path, 50)
    with files:
        files.add(prediction)
    assert names(tmp_path / "overlays") == {"a.png"}


def test_a_large_image_is_drawn_in_little_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the image and its picture, less than a map at the size of the image would take."""
    height, width = 8000, 1000
    monkeypatch.setattr(prediction_files, "_BAND", 1 << 16)
    files = PredictionFiles(
        tmp_path, {"a": Path("a")}, maps=True, overlays=True, color_range=(0, 1), progress=False
    )
    map_ = np.random.default_rng(0).random((64, 64), np.float32)
    image = np.zeros((height, width, 3), np.uint8)
    one = Prediction(np.zeros(1), [map_], ["a"], sizes=[(height, width)], images=[image])
    tracemalloc.start()
    try:
        with files:
            files.add(one)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < height * width * 4 / 2  # of NumPy and Python; Pillow's picture is not counted
    assert tifffile.imread(tmp_path / "maps/a.tiff").shape == (height, width)
    assert read(tmp_path / "overlays/a.png").shape == (height, width, 3)


def test_the_mode_of_a_picture_follows_the_umask(tmp_path: Path) -> None:
    files, prediction = pictures(tmp_path, 50)
    before = os.umask(0o027)
    try:
        with files:
            files.add(prediction)
    finally:
        os.umask(before)
    assert (tmp_path / "overlays/a.png").stat().st_mode & 0o777 == 0o640
