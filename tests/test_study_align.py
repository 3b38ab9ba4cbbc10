"""The study of registration: what it keeps, with masks and without."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import study_align
from embedded import METRICS
from parts import write_plates

SIZE = (64, 64)


@pytest.mark.parametrize("masked", [True, False])
def test_figures_are_kept_with_what_they_ran_on(
    masked: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_plates(tmp_path / "plates")
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
