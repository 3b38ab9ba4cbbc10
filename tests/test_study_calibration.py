"""The study of calibration: its rates are those that the law of the thresholds expects."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import study_calibration

from npad.evaluation.synthetic import make_dataset


def test_rates_are_the_expected_ones_where_scores_are_exchangeable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(study_calibration, "SPLITS", 300)
    rng = np.random.default_rng(0)
    rows = list(study_calibration.measured(rng.normal(size=400), np.array([-9.0, 9.0]), seed=0))
    assert [row["threshold"] for row in rows[-2:]] == ["mean + 1.28 sd", "mean + 3 sd"]
    n, tested = 260, 140
    for row in rows:
        assert (row["calibrated"], row["tested"], row["found"]) == (n, tested, 0.5)
        low, high = row["interval"]
        assert low < row["false_alarms"] < high
        if row["threshold"] == "conformal":
            k = int(row["rate"] * (n + 1))
            assert row["false_alarms"] == pytest.approx(k / (n + 1), abs=1.5 * (high - low))
        if row["splits_over_expected"] is not None:
            assert row["splits_over"] == pytest.approx(row["splits_over_expected"], abs=0.12)
    # 260 images are too few for 1 % with confidence 0.95.
    assert sum("confidence" in row["threshold"] for row in rows) == 3


def test_every_nominal_image_is_fitted_or_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(study_calibration, "SPLITS", 5)
    size = {"image_size": (64, 64), "n_train": 12, "n_test_good": 5, "n_defective": 3}
    root = make_dataset(tmp_path / "woven", **size)
    study_calibration.main([str(root), "--n-centroids", "50", "--out", str(tmp_path)])
    report = json.loads((tmp_path / "study_calibration_woven.json").read_text())
    assert report["settings"]["fitted"] == 8
    assert {name: len(found) for name, found in report["scores"].items()} == {
        "nominal": 9,
        "defective": 3,
    }
    assert "| 0.135 % | mean + 3 sd |" in capsys.readouterr().out
