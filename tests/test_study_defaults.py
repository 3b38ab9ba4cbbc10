"""The study behind the defaults: the figures of `npad evaluate`, and the backbone runs once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import study_defaults
from embedded import METRICS, EmbeddedCategory
from torch import Tensor

from npad import NPad
from npad.evaluation.datasets import Category, find_categories
from npad.evaluation.measure import evaluate
from npad.evaluation.synthetic import make_dataset
from npad.features.backbone import Backbone
from npad.settings import Settings

COMMON: dict[str, Any] = {"backbone": "filterbank", "image_size": 64, "progress": False}
VARIANTS: list[dict[str, Any]] = [
    {"n_centroids": 200},
    {"n_features": 20, "fusion": "sum", "score_window": 3, "seed": 1},
]


@pytest.fixture
def category(tmp_path: Path) -> Category:
    root = make_dataset(
        tmp_path / "woven", image_size=(64, 64), n_train=70, n_test_good=6, n_defective=10
    )
    return find_categories(root)[0]


@pytest.fixture
def n_embedded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the batches that go through a backbone."""
    sizes: list[int] = []
    forward = Backbone.forward

    def counted(self: Backbone, images: Tensor) -> Tensor:
        sizes.append(len(images))
        return forward(self, images)

    monkeypatch.setattr(Backbone, "forward", counted)
    return sizes


def test_figures_are_those_of_evaluate(
    category: Category, tmp_path: Path, n_embedded: list[int]
) -> None:
    embedded = EmbeddedCategory(category, NPad(**COMMON), tmp_path)
    network = Backbone("filterbank")
    found = [study_defaults.evaluate(Settings(**COMMON, **v), embedded, network) for v in VARIANTS]
    assert sum(n_embedded) == len(category.train) + len(category.test)
    for variant, row in zip(VARIANTS, found, strict=True):
        model = NPad(**COMMON, **variant)
        expected = evaluate(model, category, progress=False).metrics
        assert {m: row[m] for m in METRICS} == pytest.approx(
            {m: expected[m] for m in METRICS}, abs=1e-6
        )
        assert row["eps"] == model.eps_
        assert row["model_mb"] == model.nbytes / 1e6


def test_rows_are_kept_with_what_they_ran_on(category: Category, tmp_path: Path) -> None:
    root = category.train[0].parents[2]
    only = "window 1;Euclidean alone"
    arguments = [str(root), "--image-size", "64", "--only", only, "--out", str(tmp_path / "out")]
    study_defaults.main(arguments)
    report = json.loads((tmp_path / "out" / "study_woven.json").read_text())
    assert list(report["rows"]) == only.split(";")
    assert {"commit", "dirty", "processor", "npad", "torch", "threads"} <= set(report["provenance"])
