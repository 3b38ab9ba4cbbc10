"""The study behind the defaults: the figures of `npad evaluate`, and the backbone runs once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bootstrap
import numpy as np
import pytest
import study_defaults
import torch
from embedded import METRICS, EmbeddedCategory
from framed import framed
from PIL import Image
from planted import DEFECTS, planted
from torch import Tensor

from npad import NPad
from npad.evaluation.datasets import Category, find_categories
from npad.evaluation.measure import evaluate
from npad.evaluation.metrics import image_metrics, pixel_metrics
from npad.evaluation.synthetic import make_dataset
from npad.features.backbone import Backbone
from npad.images.masks import read_mask
from npad.settings import Settings

COMMON: dict[str, Any] = {"backbone": "filterbank", "image_size": 64, "progress": False}
VARIANTS: list[dict[str, Any]] = [
    {"n_centroids": 200},
    {"n_features": 20, "fusion": "sum", "score_window": 3, "seed": 1},
    {"gaussians": "joint", "map_weight": 0.6},
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
    levels = Backbone.levels

    def counted(self: Backbone, images: Tensor) -> list[Tensor]:
        sizes.append(len(images))
        return levels(self, images)

    monkeypatch.setattr(Backbone, "levels", counted)
    return sizes


def test_figures_are_those_of_evaluate(
    category: Category, tmp_path: Path, n_embedded: list[int]
) -> None:
    networks = [Backbone("filterbank", map_layers=None)]
    embedded = EmbeddedCategory(category, networks, (64, 64), tmp_path)
    study = study_defaults.Study(embedded, networks, bootstrap.draws(embedded.labels))
    found = [study.run(Settings(**COMMON, **variant)) for variant in VARIANTS]
    assert sum(n_embedded) == len(category.train) + len(category.test)
    for variant, (learned, scores, maps) in zip(VARIANTS, found, strict=True):
        model = NPad(**COMMON, **variant)
        expected = evaluate(model, category, progress=False).metrics
        figures = study.figures(scores, maps)
        assert {m: figures[m][0] for m in METRICS} == pytest.approx(
            {m: expected[m] for m in METRICS}, abs=1e-6
        )
        assert {m.eps for m in learned.members} >= {m.eps for m in model.members_} - {None}
        assert learned.nbytes == model.nbytes


def test_what_is_fitted_once(
    category: Category, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted = []
    fit = study_defaults.fit

    def counted(*arguments: Any) -> Any:
        fitted.append(arguments[1])
        return fit(*arguments)

    monkeypatch.setattr(study_defaults, "fit", counted)
    networks = [Backbone("filterbank", layers=(2, 3), map_layers=(1, 2, 3))]
    embedded = EmbeddedCategory(category, networks, (64, 64), tmp_path)
    study = study_defaults.Study(embedded, networks, bootstrap.draws(embedded.labels))
    few = {**COMMON, "n_centroids": 20, "eps": 0.1, "map_layers": (1, 2, 3), "layers": (2, 3)}
    for weight in (0.2, 0.4):
        study.run(Settings(**few, fusion_weight=weight))
    assert len(fitted) == 4  # three Gaussians, one nominal set
    study.run(Settings(**few, gaussians="joint"))
    study.run(Settings(**few, gaussians="joint", fusion="mahalanobis"))
    assert len(fitted) == 5


def test_rows_are_kept_with_what_they_ran_on(
    category: Category, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = category.train[0].parents[2]
    only = "base;window 1;Euclidean alone"
    arguments = [str(root), f"framed:{root}", "--image-size", "64", "--only", only]
    study_defaults.main([*arguments, "--out", str(tmp_path / "out")])
    report = json.loads((tmp_path / "out" / "study_defaults_filterbank.json").read_text())
    assert list(report["rows"]) == only.split(";")
    assert {"commit", "dirty", "processor", "npad", "torch", "threads"} <= set(report["provenance"])
    assert set(report["rows"]["base"]) == {"woven", "framed woven", "mean_differences"}
    row = report["rows"]["window 1"]["woven"]
    value, low, high = row["metrics"]["aupro"]
    assert low <= value <= high
    assert set(row["differences"]) == set(METRICS)
    assert capsys.readouterr().out.count("| window 1 |") == 1


def test_metrics_of_draws() -> None:
    """The first is the images as they are; the others, images as often as they were drawn."""
    rng = np.random.default_rng(0)
    labels = np.arange(30) % 3 > 0
    masks = [np.zeros((16, 16), bool) for _ in labels]
    maps = rng.normal(size=(30, 16, 16)).astype(np.float32)
    for i in np.flatnonzero(labels):
        masks[i][i % 9 : i % 9 + 5, 3:7] = True
        maps[i][masks[i]] += rng.uniform(0, 3)
    scores = maps.max((1, 2)).astype(float)
    counts = bootstrap.draws(labels)
    assert (counts[0] == 1).all()
    assert (counts[:, labels].sum(1) == labels.sum()).all()
    image = bootstrap.auroc(labels, scores, counts)
    pixel = bootstrap.pixel_metrics(masks, maps, counts)
    for draw in (0, 1, 77):
        drawn = np.repeat(np.arange(30), counts[draw].astype(int))
        expected = image_metrics(labels[drawn], scores[drawn])["auroc"]
        assert image[draw] == pytest.approx(expected, abs=1e-9)
        exact = pixel_metrics([masks[i] for i in drawn], list(maps[drawn]))
        for name, values in pixel.items():
            assert values[draw] == pytest.approx(exact[name], abs=1e-3)
    low, high = bootstrap.interval(image)
    assert low < image[0] < high


def test_framed(category: Category, tmp_path: Path) -> None:
    (found,) = find_categories(framed(category.train[0].parents[2], tmp_path / "framed"))
    assert len(found.train) == len(category.train)
    assert [s.is_anomalous for s in found.test] == [s.is_anomalous for s in category.test]
    pixels = np.asarray(Image.open(found.train[0]))
    assert pixels.shape == (64, 64, 3)
    assert (pixels[:12] == 255).all()
    assert (pixels[14:50, 14:50] < 255).any()
    assert torch.from_numpy(pixels.copy()).float().std() > 0


def test_planted(category: Category, tmp_path: Path) -> None:
    """Of good images alone: a third is kept, and a defect changes nothing outside its mask."""
    (found,) = find_categories(planted(category.train[0].parents[2], tmp_path / "planted"))
    good = [s for s in found.test if not s.is_anomalous]
    assert len(found.train) + len(good) == len(category.train)
    assert len(good) == len(category.train) // 3
    assert len(found.test) == len(good) * (1 + len(DEFECTS))
    clean = {s.path.name: np.asarray(Image.open(s.path)).astype(int) for s in good}
    for sample in found.test:
        if sample.mask_path is not None:
            change = np.abs(np.asarray(Image.open(sample.path)) - clean[sample.path.name]).max(2)
            mask = read_mask(sample.mask_path)
            assert change[mask].any()
            assert not change[~mask].any()
