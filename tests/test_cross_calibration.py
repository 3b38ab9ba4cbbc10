"""Calibration with the images fitted: each is scored by a model of the others."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import SMALL, fail, succeed
from PIL import Image

from npad import NPad

SIZE = (24, 32)
# With these a model of merged statistics is that of one fit: nothing is drawn, every embedding is kept.
DRAWS_NOTHING = {"eps": 0.01, "window": 3, "n_centroids": 100_000, "n_features": None}


def images(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (n, *SIZE, 3), dtype=np.uint8)


def new(**arguments: object) -> NPad:
    small = {"image_size": SIZE, "n_centroids": 16, "false_alarm_rate": 0.2, "progress": False}
    return NPad("filterbank", **{**small, "batch_size": 4, **arguments})


def folds_of(n_images: int, n: int, seed: int = 0) -> np.ndarray:
    """The fold of each image."""
    drawn = random.Random(seed)
    found: list[int] = []
    while len(found) < n_images:
        found += reversed(drawn.sample(range(n), n))
    return np.array(found[:n_images])


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"n_features": "auto"},
        {"gaussians": "joint"},
        {"nominal_set": None},
        {"fusion": "euclidean"},
        {"n_features": 5},
        {"n_features": 5, "reduction": "random", "seed": 3},
    ],
)
def test_each_image_is_scored_by_a_model_of_the_other_folds(arguments: dict[str, object]) -> None:
    x = images(17, 0)
    known = {**DRAWS_NOTHING, **arguments}
    tolerance = (
        5e-3 if known["n_features"] == "auto" else 1e-4
    )  # there is one number of axes for all
    model = new(calibration_folds=4, factor_dtype="float32", **known).fit(x)
    folds = folds_of(17, 4, int(arguments.get("seed", 0)))
    if "n_features" not in arguments or "reduction" in arguments:  # else axes are those of all
        for fold in range(4):
            own = folds == fold
            found = (
                new(factor_dtype="float32", **known).fit(x[~own]).predict(x[own], map_size="model")
            )
            at = np.flatnonzero(own)
            np.testing.assert_allclose(model.calibration_.scores[at], found.scores, rtol=tolerance)
            np.testing.assert_allclose(
                model.calibration_.map_maxima[at], found.map_maxima, rtol=tolerance
            )
    whole = model.predict(x).scores
    assert (model.calibration_.scores > whole).mean() > 0.9  # who knows an image scores it lower
    assert model.calibration_.groups is None


@pytest.mark.parametrize("arguments", [{}, {"fusion": "sum", "holdout": 0.3}, {"n_features": 5}])
def test_the_model_is_the_one_without(arguments: dict[str, object]) -> None:
    x = images(20, 1)
    plain = new(**arguments).fit(x)
    model = new(calibration_folds=3, **arguments).fit(x)
    for a, b in zip(plain.members_, model.members_, strict=True):
        assert a.to_json() == b.to_json()
        for name, tensor in a.tensors().items():
            assert torch.equal(tensor, b.tensors()[name])
    assert np.array_equal(plain.predict(x).scores, model.predict(x).scores)
    assert plain.calibration_ is None
    assert model.fit(x[:8], statistics=False).calibration_ is not None


def test_good_images_to_come_are_alarms_at_about_the_rate() -> None:
    model = new(calibration_folds=5, false_alarm_rate=0.1).fit(images(60, 2))
    found = model.predict(images(300, 3))
    assert 0.02 < found.labels.mean() < 0.2
    assert 0.35 < found.p_values.mean() < 0.65
    assert 0.01 < np.mean([mask.any() for mask in found.masks]) < 0.2


def test_streams_and_files_give_the_same(tmp_path: Path) -> None:
    x = images(13, 4)
    for i, image in enumerate(x):
        Image.fromarray(image).save(tmp_path / f"{i:02}.png")
    expected = new(calibration_folds=3).fit(x).calibration_
    for source in (tmp_path, (batch for batch in np.split(x, [4, 8, 12]))):
        found = new(calibration_folds=3).fit(source).calibration_
        assert np.array_equal(found.scores, expected.scores)
    (tmp_path / "02.png").write_bytes(b"no image")
    found = new(calibration_folds=3).fit(tmp_path, skip_bad=True).calibration_
    assert len(found.scores) == 12


def test_what_is_refused(tmp_path: Path) -> None:
    x = images(12, 5)
    for wrong in (1, 0, -2, 2.5, True, "5", [5]):
        with pytest.raises(ValueError, match="calibration_folds must be an int of at least 2"):
            new(calibration_folds=wrong)
    with pytest.raises(ValueError, match="calibration_folds=13 is more than 12 images"):
        new(calibration_folds=13).fit(x)
    rate = r"NPad\.fit: to calibrate, false_alarm_rate=0\.01 needs 99 nominal images, got 12"
    with pytest.raises(ValueError, match=rate):
        new(calibration_folds=3, false_alarm_rate=0.01).fit(x)
    with pytest.raises(ValueError, match=rate):
        new(calibration_folds=3, false_alarm_rate=0.01).fit(batch for batch in [x[:6], x[6:]])
    with pytest.raises(ValueError, match="needs images that can be read twice"):
        new(calibration_folds=3, n_features=4).fit(batch for batch in [x])
    for i, image in enumerate(x):
        Image.fromarray(image).save(tmp_path / f"{i:02}.png")
    with pytest.raises(ValueError, match="checkpoint and calibration_folds=3 exclude each other"):
        new(calibration_folds=3).fit(tmp_path, checkpoint=tmp_path / "c.npad")


def test_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    for i, image in enumerate(images(12, 6)):
        Image.fromarray(image).save(tmp_path / f"train/{i:02}.png")
    path, rate = tmp_path / "m.npad", ("--false-alarm-rate", "0.2")
    said = succeed(
        *("fit", tmp_path / "train", "-o", path, *SMALL, *rate, "--calibration-folds", "4")
    ).out
    assert "12 nominal images" in said
    out = succeed("predict", path, tmp_path / "train", "-o", tmp_path / "out").out
    assert "anomalous" in out
    fail(
        2,
        *("fit", tmp_path / "train", "-o", path, *SMALL, "--calibration-folds", "1"),
        says=["--calibration-folds must be"],
    )
    fail(
        1,
        *("fit", tmp_path / "train", "-o", path, *SMALL, "--calibration-folds", "3"),
        says=["--false-alarm-rate 0.01 needs 99"],
    )
