"""The study of tiles: what it keeps, with masks and without, and where it pastes a defect."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import study_tiles
from mosaics import Layout, drawn_mosaics
from parts import write_plates
from PIL import Image

from npad.evaluation.datasets import find_categories

SIZE = (64, 64)
SMALL = ["--piece", "64", "--small", "96", "--tile", "160", "--n-features", "8"]


@pytest.fixture
def plates(tmp_path: Path) -> Path:
    """With defects of 1, 9 and 49 pixels."""
    return write_plates(tmp_path / "plates", sides=(1, 3, 7))


def test_one_piece_is_defective_and_no_good_one_is_fitted_and_scored(
    plates: Path, tmp_path: Path
) -> None:
    (category,) = find_categories(plates)
    layout = Layout(2, 3, 64)
    found = drawn_mosaics(category, layout, (4, 2, 6), 0, tmp_path)
    assert (len(found.train), len(found.test), layout.size) == (4, 8, (128, 192))

    def pieces(path: Path) -> list[bytes]:
        pixels = np.asarray(Image.open(path))
        assert pixels.shape == (*layout.size, 3)
        return [pixels[layout.place(i)].tobytes() for i in range(6)]

    fitted = {piece for path in found.train for piece in pieces(path)}
    bad = {
        np.asarray(Image.open(sample.path).convert("RGB")).tobytes()
        for sample in category.test
        if sample.is_anomalous
    }
    for mosaic in found.test:
        those = pieces(mosaic.path)
        assert not fitted & {*those}
        where = [i for i, piece in enumerate(those) if piece in bad]
        assert where == ([] if mosaic.defective is None else [mosaic.defective])
        if mosaic.defective is not None:
            mask = mosaic.mask(layout)
            assert mask[layout.place(mosaic.defective)].sum() == mask.sum()
    assert len({mosaic.defective for mosaic in found.test}) > 2
    assert sorted(m.mask(layout).sum() for m in found.test) == [0, 0, 9, 9, 9, 49, 49, 49]
    least = drawn_mosaics(category, layout, (1, 1, 1), 0, tmp_path).test[-1]
    assert least.mask(layout).sum() == 9  # one pixel is a speck


@pytest.mark.parametrize("masked", [True, False])
def test_figures_are_kept_with_what_they_ran_on(
    masked: bool, plates: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not masked:
        shutil.rmtree(plates / "ground_truth")
    runs = ["--images", "6,3,3", "--n-centroids", "50", "--out", str(tmp_path / "out")]
    study_tiles.main([str(plates), *SMALL, *runs, "--mosaic", "3x4", "--smoothings", "1,0.5"])
    report = json.loads((tmp_path / "out/study_tiles_plates_3x4.json").read_text())
    assert report["provenance"]["packages"]
    assert ("marked" in report) == masked
    rows = report["views"]
    assert {name: row["arguments"]["image_size"] for name, row in rows.items()} == {
        "resized": 96,
        "resized, own shape": [80, 112],
        "tiles": [192, 256],
    }
    for name, row in rows.items():
        sigmas = ["3", "1.5"] if name == "tiles" else row["smoothings"]
        assert [*row["smoothings"]] == [*sigmas]
        for found in row["smoothings"].values():
            assert all(metric in found for metric in study_tiles.METRICS) == masked
            assert 0 <= found["pointed"] <= 1
    assert capsys.readouterr().out.count("| tiles |") == 2


def test_a_default_overlap_changes_nothing(plates: Path, tmp_path: Path) -> None:
    runs = ["--images", "6,1,1", "--n-centroids", "50", "--out", str(tmp_path / "out")]
    study_tiles.main([str(plates), *SMALL, *runs, "--overlaps", "0,96"])
    report = json.loads((tmp_path / "out/study_tiles_plates_4x4_overlaps.json").read_text())
    rows = report["overlaps"]
    assert [row["overlap"] for row in rows.values()] == [None, 0, 96, 128]
    for what, bound in {"scored": 1e-4, "fitted": 1e-3}.items():
        assert rows["whole"][what]["largest"] == 0
        assert rows["default"][what]["largest"] < bound < rows["96"][what]["largest"]
    assert rows["0"]["scored"]["mean"] > rows["96"]["scored"]["mean"]
    assert rows["0"]["cost"] < rows["96"]["cost"] < rows["default"]["cost"]
