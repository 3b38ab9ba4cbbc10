"""The study of registration: what it keeps, with masks and without."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import study_align
from embedded import METRICS
from image_files import save_image
from parts import part

SIZE = (64, 64)


@pytest.mark.parametrize("masked", [True, False])
def test_figures_are_kept_with_what_they_ran_on(
    masked: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "plates"
    for i in range(8):
        save_image(root / f"train/good/{i}.png", part(SIZE, seed=i))
    for i in range(3):
        save_image(root / f"test/good/{i}.png", part(SIZE, seed=100 + i))
        save_image(root / f"test/spot/{i}.png", part(SIZE, defect=(0, 0.1), seed=200 + i))
        mask = np.zeros(SIZE, np.uint8)
        mask[35:42, 28:35] = 255
        save_image(root / f"ground_truth/spot/{i}_mask.png", mask)
    if not masked:
        shutil.rmtree(root / "ground_truth")
    small = ["--image-size", "64", "--n-centroids", "50", "--images", "8,3,3"]
    runs = ["--jitters", "0,12", "--seeds", "0,1", "--out", str(tmp_path / "out")]
    study_align.main([str(root), *small, *runs])
    report = json.loads((tmp_path / "out/study_align_plates.json").read_text())
    assert "opencv-python-headless" in report["provenance"]["packages"]
    assert report["rows"].keys() == {"none", "translation", "euclidean"}
    metrics = METRICS if masked else METRICS[:1]
    for align, at in report["rows"].items():
        assert at.keys() == {"0", "12"}
        for run in (run for at_jitter in at.values() for run in at_jitter):
            assert list(run)[: len(metrics)] == list(metrics)
            assert (len(run) == len(metrics)) == (align == "none")
    assert all(run["unaligned_to_score"] == 0 for run in report["rows"]["euclidean"]["12"])
    tables = capsys.readouterr().out
    assert tables.count("| euclidean |") == len(metrics) + 3
