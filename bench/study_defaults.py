"""The study behind NPad's defaults: one factor at a time around a base configuration.

    python bench/study_defaults.py DIR synthetic --backbone resnet18 --weights FILE --out bench/results

DIR is an MVTec AD category; "synthetic" is aligned woven texture. The backbone runs once per image:
every configuration is fitted and scored from its embeddings, which wait in files below TMPDIR (1.6 MB
an image with ResNet-18). Prints a table for each, those of docs/method.md, and writes it to
study_<name>.json row by row.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from embedded import METRICS, EmbeddedCategory
from provenance import provenance
from torch import Tensor

from npad import NPad
from npad.evaluation.datasets import find_categories
from npad.evaluation.synthetic import make_dataset
from npad.features.backbone import Backbone
from npad.fitting import Fit, axes_sample
from npad.learned import Learned
from npad.scoring.scorer import Scorer
from npad.settings import Settings

VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "window 1": {"window": 1},
    "window 5": {"window": 5},
    "evaluation window 3": {"score_window": 3},
    "eps 0.0001": {"eps": 1e-4},
    "eps 0.001": {"eps": 1e-3},
    "eps 0.01": {"eps": 1e-2},
    "Mahalanobis alone": {"nominal_set": None},
    "Mahalanobis alone, window 1": {"nominal_set": None, "window": 1},
    "Mahalanobis alone, evaluation window 3": {"nominal_set": None, "score_window": 3},
    "Euclidean alone": {"fusion": "euclidean"},
    "Euclidean alone, 1024 centroids": {"fusion": "euclidean", "n_centroids": 1024},
    "Euclidean alone, 1024 k-means centroids": {
        "fusion": "euclidean",
        "nominal_set": "kmeans",
        "n_centroids": 1024,
    },
    "1024 centroids": {"n_centroids": 1024},
    "2048 centroids": {"n_centroids": 2048},
    "4096 centroids": {"n_centroids": 4096},
    "1024 k-means centroids": {"nominal_set": "kmeans", "n_centroids": 1024},
    "weight 0.3": {"fusion_weight": 0.3},
    "weight 0.5": {"fusion_weight": 0.5},
    "weight 0.7": {"fusion_weight": 0.7},
    "sum": {"fusion": "sum"},
    "float32 factor": {"factor_dtype": "float32"},
    "bfloat16 factor": {"factor_dtype": "bfloat16"},
    "192 features, PCA": {"n_features": 192},
    "100 features, PCA": {"n_features": 100},
    "192 features, random": {"n_features": 192, "reduction": "random"},
}


def fit(settings: Settings, embeddings: Tensor) -> Learned:
    """As `NPad.fit` does from the images of these embeddings, (N, h, w, D)."""
    run = Fit(settings)
    if settings.chooses_axes:
        sample = embeddings[axes_sample(len(embeddings), settings.seed)]
        run.choose_axes(sample.split(settings.batch_size))
    for x in embeddings.split(settings.batch_size):
        run.update(embeddings=x)
    return run.finalize()


def evaluate(settings: Settings, category: EmbeddedCategory, network: Backbone) -> dict[str, Any]:
    """Fit and measure one configuration; its metrics, the eps in use and the model's size."""
    learned = fit(settings, category.train)
    scorer = Scorer(network, learned, settings)  # whose network is not run
    batches = [scorer.score(x) for x in category.test.split(settings.batch_size)]
    scores, maps = (torch.cat(parts) for parts in zip(*batches, strict=True))
    figures = category.measure(scores, maps)
    return {**figures, "eps": learned.eps, "model_mb": learned.nbytes / 1e6}


def study(data: str, args: argparse.Namespace, folder: Path) -> None:
    """Every configuration on one category; its table is printed and its file written."""
    root = make_dataset(folder / "woven", seed=0) if data == "synthetic" else Path(data)
    (category,) = find_categories(root)
    name = Path(data).resolve().name
    report: dict[str, Any] = {
        "provenance": provenance(),
        "settings": {
            "data": name,
            "backbone": args.backbone,
            "image_size": args.image_size,
            "seeds": args.seeds,
        },
        "rows": {},
    }
    common: dict[str, Any] = {
        "backbone": args.backbone,
        "weights": args.weights,
        "image_size": args.image_size,
        "progress": False,
    }
    embedded = EmbeddedCategory(category, NPad(**common), folder)
    network = Backbone(args.backbone, weights=args.weights)
    print(f"| {name} | image AUROC | pixel AUROC | AUPRO | eps | model MB |")
    print("|---|---|---|---|---|---|", flush=True)
    for variant in args.only.split(";") if args.only else VARIANTS:
        runs = [
            evaluate(Settings(**common, **VARIANTS[variant], seed=seed), embedded, network)
            for seed in map(int, args.seeds.split(","))
        ]
        means = [
            f"{fmean(run[metric] for run in runs):.4f}" if metric in runs[0] else "no masks"
            for metric in METRICS
        ]
        eps = "none" if runs[0]["eps"] is None else f"{fmean(run['eps'] for run in runs):.1e}"
        size = f"{runs[0]['model_mb']:.0f}"
        print("| " + " | ".join([variant, *means, eps, size]) + " |", flush=True)
        report["rows"][variant] = runs
        (args.out / f"study_{name}.json").write_text(json.dumps(report, indent=1) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="+", help="MVTec AD categories, or 'synthetic'")
    parser.add_argument("--backbone", default="filterbank")
    parser.add_argument("--weights")
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--only", help="names of variants, separated by ;")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    for data in args.data:
        with tempfile.TemporaryDirectory() as folder:
            study(data, args, Path(folder))


if __name__ == "__main__":
    main()
