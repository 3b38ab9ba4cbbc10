"""The study of jitter: images and masks move together, and its figures are those of `npad evaluate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import study_jitter
from embedded import METRICS, EmbeddedCategory
from PIL import Image

from npad import NPad
from npad.evaluation.datasets import Category, find_categories
from npad.evaluation.measure import evaluate
from npad.evaluation.synthetic import make_dataset
from npad.features.backbone import Backbone
from npad.images.masks import read_mask

COMMON: dict[str, Any] = {"backbone": "filterbank", "image_size": 64, "progress": False}


@pytest.fixture
def category(tmp_path: Path) -> Category:
    root = make_dataset(
        tmp_path / "woven", image_size=(64, 64), n_train=12, n_test_good=4, n_defective=5
    )
    return find_categories(root)[0]


@pytest.mark.parametrize(("right", "down"), [(3, 0), (0, -2), (-5, 7)])
@pytest.mark.parametrize("colours", [(), (3,)])
def test_a_shift_by_whole_pixels_reflects_what_comes_in(
    right: int, down: int, colours: tuple[int, ...]
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (256, 256, *colours), dtype=np.uint8)
    wide = np.pad(pixels, [(9, 9), (9, 9), (0, 0)][: pixels.ndim], mode="reflect")
    expected = wide[9 - down : 265 - down, 9 - right : 265 - right]
    found = study_jitter.moved(Image.fromarray(pixels), np.array([right, down, 0.0]))
    np.testing.assert_array_equal(np.asarray(found), expected)


def test_a_turn_moves_the_middle_of_an_edge_by_the_jitter() -> None:
    pixels = np.zeros((512, 512), dtype=np.uint8)  # where a pixel of the jitter is two
    pixels[248:264, 490:500] = 255
    found = np.asarray(study_jitter.moved(Image.fromarray(pixels), np.array([0.0, 0.0, 8.0])))
    centre = np.argwhere(found).mean(axis=0)
    angle, radius = 8 / 128, 494.5 - 255.5
    expected = 255.5 + radius * np.sin(angle), 255.5 + radius * np.cos(angle)
    np.testing.assert_allclose(centre, expected, atol=0.2)


def test_masks_move_with_their_images(category: Category, tmp_path: Path) -> None:
    """Marked in red, so that the image tells where its mask has to be."""
    for sample in category.test:
        if sample.mask_path is not None:
            red = read_mask(sample.mask_path)[..., None] * np.array([255, 0, 0])
            Image.fromarray(red.astype(np.uint8)).save(sample.path)
    found = study_jitter.jittered(category, 8, 0, tmp_path)
    n_moved = 0
    for sample, before in zip(found.test, category.test, strict=True):
        if sample.mask_path is None or before.mask_path is None:
            assert not sample.is_anomalous
            continue
        mask = read_mask(sample.mask_path)
        red = np.asarray(Image.open(sample.path))[..., 0] > 127
        assert (red != mask).mean() < 0.01
        n_moved += bool((mask != read_mask(before.mask_path)).any())
    assert n_moved == 5


def test_without_jitter_the_figures_are_those_of_evaluate(
    category: Category, tmp_path: Path
) -> None:
    assert study_jitter.jittered(category, 0, 0, tmp_path) is category
    embedded = EmbeddedCategory(category, [Backbone("filterbank")], (64, 64), tmp_path)
    rows = dict(study_jitter.npad_rows(embedded, COMMON, seed=1))
    for row, arguments in {
        "Euclidean alone": {"fusion": "euclidean"},
        "Gaussians alone, window 5, evaluation 3": {
            "nominal_set": None,
            "window": 5,
            "score_window": 3,
        },
        "product, window 3, evaluation 1": {"window": 3},
    }.items():
        expected = evaluate(
            NPad(**COMMON, **study_jitter.JOINT, **arguments, seed=1), category, progress=False
        ).metrics
        assert {m: rows[row][m] for m in METRICS} == pytest.approx(
            {m: expected[m] for m in METRICS}, abs=1e-6
        )


@pytest.mark.parametrize("masked", [True, False])
def test_figures_are_kept_with_what_they_ran_on(
    category: Category, tmp_path: Path, capsys: pytest.CaptureFixture[str], masked: bool
) -> None:
    root = category.train[0].parents[2]
    if not masked:
        (root / "ground_truth").rename(tmp_path / "elsewhere")
    arguments = [str(root), "--image-size", "64", "--jitters", "0,2", "--seeds", "0,1"]
    study_jitter.main([*arguments, "--images", "8,3,4", "--out", str(tmp_path / "out")])
    report = json.loads((tmp_path / "out" / "study_jitter_woven.json").read_text())
    assert {"commit", "dirty", "processor", "npad", "torch"} <= set(report["provenance"])
    assert len(report["rows"]) == 13
    metrics = set(METRICS if masked else METRICS[:1])
    for at in report["rows"].values():
        assert {jitter: len(runs) for jitter, runs in at.items()} == {"0": 2, "2": 2}
        assert all(set(run) - {"eps"} == metrics for runs in at.values() for run in runs)
    assert capsys.readouterr().out.count("| Euclidean alone |") == len(metrics)
