"""`npad calibrate`, and what `npad predict` says with a calibrated model."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from command_line import SMALL, fail, succeed
from image_files import smooth_pixels
from PIL import Image

from npad import NPad


def folder_of(path, n, seed, brighter=0):
    """Smooth images, all of them different."""
    path.mkdir(parents=True)
    for i in range(n):
        pixels = np.random.default_rng([seed, i]).normal(0, 8, (40, 56, 3)) + brighter
        image = smooth_pixels(40, 56) * 0.5 + 40 + pixels
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(path / f"{i:02}.png")
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Folders: two cameras' nominal images to calibrate, and new ones, the last two with a spot."""
    root = tmp_path_factory.mktemp("images")
    folder_of(root / "train", 8, 0)
    folder_of(root / "nominal/left", 12, 1)
    folder_of(root / "nominal/right", 10, 2, brighter=30)
    folder_of(root / "new/left", 6, 3)
    folder_of(root / "new/right", 4, 4, brighter=30)
    for i in (4, 5):
        path = root / f"new/left/{i:02}.png"
        pixels = np.asarray(Image.open(path)).copy()
        pixels[8:20, 30:44] = 255 - pixels[8:20, 30:44]
        Image.fromarray(pixels).save(path)
    return root


@pytest.fixture(scope="module")
def fitted(images):
    path = images / "m.npad"
    succeed("fit", images / "train", "-o", path, *SMALL)
    return path


@pytest.fixture(scope="module")
def calibrated(images, fitted):
    path = images / "c.npad"
    said = succeed(
        *("calibrate", fitted, images / "nominal", "-o", path, "--false-alarm-rate", "0.1")
    ).out
    assert f"{path}:\ncalibrated with 22 nominal images, false-alarm rate 0.1\n" in said
    assert "anomalous above a score of" in said
    return path


def test_what_predict_writes(images, calibrated, tmp_path):
    said = succeed("predict", calibrated, images / "new", "-o", tmp_path, "--maps", "--masks").out
    model = NPad.load(calibrated)
    paths = sorted((images / "new").rglob("*.png"))
    expected = model.predict(paths, map_size="model")
    n_anomalous = int(expected.labels.sum())
    assert 2 <= n_anomalous < 10
    assert f"10 images, {n_anomalous} anomalous" in said
    with (tmp_path / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == expected.paths
    for row, score, p, anomalous, regions in zip(
        rows, expected.scores, expected.p_values, expected.labels, expected.regions, strict=True
    ):
        assert float(row["score"]) == score
        assert float(row["p_value"]) == p
        assert float(row["threshold"]) == model.threshold_
        assert int(row["anomalous"]) == anomalous
        assert int(row["n_regions"]) == len(regions)
    with (tmp_path / "regions.csv").open() as file:
        found = list(csv.DictReader(file))
    flat = [(p, r) for p, rs in zip(expected.paths, expected.regions, strict=True) for r in rs]
    assert len(found) == len(flat) >= 2
    for row, (path, region) in zip(found, flat, strict=True):
        assert row["path"] == path
        place = tuple(int(row[name]) for name in ("left", "top", "width", "height"))
        assert (place, int(row["area"])) == (region.box, region.area)
        assert float(row["peak"]) == region.peak
    lines = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    for line, map_, size, regions in zip(
        lines, expected.maps, expected.sizes, expected.regions, strict=True
    ):
        assert line["anomalous"] == (line["score"] > line["threshold"])
        assert [tuple(region["box"]) for region in line["regions"]] == [r.box for r in regions]
        written = np.asarray(Image.open(tmp_path / line["map"]))
        mask = np.asarray(Image.open(tmp_path / line["mask"]))
        assert mask.dtype == bool
        assert mask.shape == size
        assert np.array_equal(mask, written > model.map_threshold_)
        assert mask.any() == (map_.max() > model.map_threshold_) or not mask.any()
    spots = [line for line in lines if line["path"].endswith(("left/04.png", "left/05.png"))]
    for line in spots:  # within them, or around their edges
        x, y = line["regions"][0]["peak_at"]
        assert (26 <= x < 48, 4 <= y < 24) == (True, True)


def test_marked_regions_are_outlined_on_overlays(images, fitted, calibrated, tmp_path):
    spot = images / "new/left/05.png"
    for name, model in (("plain", fitted), ("decided", calibrated)):
        for colors in ((), ("--color-range", "0,50")):
            out = tmp_path / f"{name}{len(colors)}"
            succeed("predict", model, spot, "-o", out, *colors)
            pixels = np.asarray(Image.open(out / "overlays/05.png.png"))
            outlined = (pixels == (90, 220, 255)).all(-1)
            assert outlined.any() == (name == "decided")
    assert not (tmp_path / "plain0/regions.csv").exists()
    with (tmp_path / "plain0/scores.csv").open() as file:
        assert next(csv.reader(file)) == ["path", "score"]


def test_groups_are_the_paths(images, fitted, tmp_path):
    path = tmp_path / "g.npad"
    nominal, new = images / "nominal", images / "new"
    said = succeed(
        *("calibrate", fitted, nominal / "left", nominal / "right", "-o", path),
        *("--false-alarm-rate", "0.1", "--group-by-folder"),
    ).out
    assert "22 nominal images in 2 groups" in said
    model = NPad.load(path)
    assert list(model.threshold_) == ["left", "right"]
    given = new / "left", new / "right/02.png"
    succeed("predict", path, *given, "-o", tmp_path / "out", "--group-by-folder", "--no-overlays")
    with (tmp_path / "out/scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    groups = [Path(row["path"]).parent.name for row in rows]
    assert groups == ["left"] * 6 + ["right"]
    assert [float(r["threshold"]) for r in rows] == [model.threshold_[group] for group in groups]
    succeed("predict", path, new / "left", "-o", tmp_path / "one", "--group", "left")
    out = "-o", tmp_path / "none"
    fail(1, "predict", path, new, *out, says=["('left', 'right')", "--group of which"])
    fail(1, "predict", path, new, *out, "--group", "top", says=["no group 'top'"])
    fail(2, "predict", path, new, *out, "--group", "left", "--group-by-folder", says=["exclude"])
    assert not (tmp_path / "none").exists()


def test_the_model_is_replaced_and_its_settings_stay(images, fitted, tmp_path):
    path = tmp_path / "m.npad"
    path.write_bytes(fitted.read_bytes())
    succeed("calibrate", path, images / "nominal", "--false-alarm-rate", "0.2", "--confidence=0.9")
    model = NPad.load(path)
    assert (model.false_alarm_rate, model.confidence) == (0.2, 0.9)
    assert len(model.calibration_.scores) == 22
    out = tmp_path / "out"
    succeed("predict", path, images / "new/left", "-o", out, "--false-alarm-rate", "0.15")
    with (out / "scores.csv").open() as file:
        threshold = float(next(csv.DictReader(file))["threshold"])
    model.false_alarm_rate = 0.15
    assert threshold == model.threshold_


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (("{images}/nominal",), 1, ["--false-alarm-rate 0.01 needs 99", "got 22"]),
        (("{images}/nominal", "--false-alarm-rate", "0"), 2, ["--false-alarm-rate must be"]),
        (("{images}/nominal", "--confidence", "1"), 2, ["--confidence must be"]),
        (("{images}/nominal", "--confidence", "x"), 2, ["'x' cannot be understood"]),
        (("{images}/absent",), 2, ["absent"]),
        (("{images}/nominal", "-o", "{images}/absent/m.npad"), 2, ["is not a folder"]),
        (("{images}/m.npad", "--false-alarm-rate", ".5"), 1, ["m.npad"]),
        (("{images}/nominal", "--group-by-folder", "--group", "a"), 2, ["exclude each other"]),
    ],
)
def test_what_calibrate_refuses(images, fitted, args, code, says):
    before = fitted.read_bytes()
    fail(code, "calibrate", fitted, *(arg.format(images=images) for arg in args), says=says)
    assert fitted.read_bytes() == before


def test_folders_of_defects_are_refused(images, fitted, tmp_path):
    folder_of(tmp_path / "set/good", 3, 5)
    folder_of(tmp_path / "set/scratch", 3, 6)
    fail(2, "calibrate", fitted, tmp_path / "set", says=["seems to hold images with defects"])


@pytest.mark.filterwarnings("default")
def test_images_that_were_fitted_are_told(images, fitted, tmp_path):
    out = "-o", tmp_path / "m.npad", "--false-alarm-rate", "0.2"
    said = succeed("calibrate", fitted, images / "train", images / "nominal", *out).err
    assert "npad: warning: 8 of 30 images were fitted" in said


def test_masks_need_a_calibration(images, fitted, tmp_path):
    out = tmp_path / "out"
    fail(2, "predict", fitted, images / "new", "-o", out, "--masks", says=["npad calibrate"])
    assert not out.exists()
