"""The study of drift: quiet orders, and a change of light that raises the monitor."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import study_drift
from image_files import smooth_pixels
from PIL import Image

from npad.evaluation.synthetic import make_dataset


def test_light_is_what_it_says(tmp_path: Path) -> None:
    pixels = smooth_pixels(5, 7)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    expected = np.minimum(np.rint(pixels * 1.5), 255)
    assert np.array_equal(study_drift.lit(tmp_path / "a.png", 1.5), expected)
    assert np.array_equal(study_drift.lit(tmp_path / "a.png", 1.0), pixels)


def test_exchangeable_scores_raise_no_more_monitors_than_the_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(study_drift, "ORDERS", 40)
    rows = study_drift.quiet(np.random.default_rng(0).exponential(size=80), seed=0)
    assert [row["bound"] for row in rows] == [0.01, 0.05, 0.2]
    for row in rows:
        assert (row["calibrated"], row["stream"], row["orders"]) == (34, 46, 40)
        assert row["interval"][0] <= row["bound"]
    assert rows[0]["raised"] <= rows[2]["raised"]


def test_the_whole_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(study_drift, "ORDERS", 3)
    monkeypatch.setattr(study_drift, "RAMPS", 2)
    monkeypatch.setattr(study_drift, "CALIBRATED", 0.7)
    monkeypatch.setattr(study_drift, "QUIET", 0.05)
    monkeypatch.setattr(study_drift, "STEPS", (0.05, 0.0))
    size = {"image_size": (64, 64), "n_train": 200, "n_test_good": 100, "n_defective": 1}
    root = make_dataset(tmp_path / "woven", **size)
    study_drift.main([str(root), "--n-centroids", "50", "--out", str(tmp_path)])
    report = json.loads((tmp_path / "study_drift_woven.json").read_text())
    assert report["settings"]["fitted"] == 150
    assert len(report["scores"]) == 150
    brighter, same = report["light"]
    assert (brighter["calibrated"], brighter["quiet"], brighter["changing"]) == (105, 8, 37)
    assert brighter["raised_early"] == 0
    assert len(brighter["raised_after"]) == 2
    assert all(a <= 37 for a in brighter["raised_after"])
    assert same["raised_after"] == []
    said = capsys.readouterr().out
    assert "| +5.0 % an image | 2 of 2 |" in said
    assert "| +0.0 % an image | 0 of 2 | not in 37 | to 100 % | – |" in said
