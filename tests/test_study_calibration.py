"""The study of calibration: its rates are those that the law of the thresholds expects."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import study_calibration
from study_calibration import Split, conformals, measured, others

from npad.evaluation.synthetic import make_dataset


def test_rates_are_the_expected_ones_where_scores_are_exchangeable() -> None:
    rng = np.random.default_rng(0)
    bad = np.full(4, 9.0)
    splits = [Split(rng.normal(size=260), rng.normal(size=140), bad) for _ in range(300)]
    rows = list(measured(splits, [*conformals(260, "conformal"), *others()]))
    for row in rows:
        assert (row["calibrated"], row["tested"]) == (260, 140)
        low, high = row["interval"]
        assert low <= row["false_alarms"] <= high
        if row["false_alarms_expected"] is not None:
            error = 2 * (high - low)
            assert row["false_alarms"] == pytest.approx(row["false_alarms_expected"], abs=error)
            assert row["splits_over"] == pytest.approx(row["splits_over_expected"], abs=0.12)
    # 260 images are too few for 1 % with confidence 0.95.
    assert sum("confidence" in row["threshold"] for row in rows) == 3
    highest, f1 = (row["false_alarms"] for row in rows if row["rate"] is None)
    assert highest == pytest.approx(1 / 261, abs=0.004)
    assert f1 < 0.01  # as the defects are beyond all doubt


def test_every_image_has_its_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = {"image_size": (64, 64), "n_train": 30, "n_test_good": 10, "n_defective": 4}
    root = make_dataset(tmp_path / "woven", **size)
    small = "--n-centroids", "50", "--image-size", "64", "--splits", "3"
    study_calibration.main([str(root), *small, "--out", str(tmp_path)])
    report = json.loads((tmp_path / "study_calibration_woven.json").read_text())
    assert report["fitted"] == 20
    calibrated = {row["threshold"]: row["calibrated"] for row in report["rows"]}
    assert calibrated["conformal"] == 12
    assert calibrated["cross-conformal, 5 folds"] == 32
    assert {row["tested"] for row in report["rows"]} == {8}
    assert "| 0.135 % | mean + 3 sd |" in capsys.readouterr().out
