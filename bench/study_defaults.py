"""The study behind NPad's defaults: one factor at a time around a base configuration.

    python bench/study_defaults.py DIR --backbone resnet18 --weights FILE --out study.json

DIR is an MVTec AD category, or "synthetic" for aligned woven texture. Embeddings are computed once and
kept in memory; everything else is NPad itself. Prints the table of docs/method.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from npad import NPad, fitting
from npad.evaluation.datasets import find_categories
from npad.evaluation.measure import evaluate
from npad.evaluation.synthetic import make_dataset
from npad.statistics.nominal_set import NominalSet

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
METRICS = ("auroc", "pixel_auroc", "aupro")


class CachedNominalSet(NominalSet):
    """A nominal set that is found once for the same embeddings.

    The first centres of greedy k-center are those of a smaller set, so one long run serves all sizes.
    """

    known: dict[tuple[object, ...], Tensor] = {}  # noqa: RUF012  (shared by all on purpose)

    def finalize(self, advance: Callable[[int], None] | None = None) -> NominalSet:
        nested = self.method == "kcenter"
        total = float(sum(part.sum(dtype=torch.float64) for part in self._bank))
        key = self.method, None if nested else self.n_centroids, self.seed, self.n_seen, total
        if key in self.known and len(self.known[key]) >= self.n_centroids:
            self.centroids_ = self.known[key][: int(self.n_centroids)]
            return self
        super().finalize(advance)
        self.known[key] = self.centroids_
        return self


class CachedNPad(NPad):
    """NPad whose backbone runs once per image."""

    cache: dict[int, Tensor] = {}  # noqa: RUF012

    def _embed(self, images: Tensor, projection: Tensor | None = None) -> Tensor:
        keys = [zlib.crc32(image.numpy()) for image in images]
        if any(key not in self.cache for key in keys):
            for key, embedding in zip(keys, self._network()(images), strict=True):
                self.cache[key] = embedding.clone()
        x = torch.stack([self.cache[key] for key in keys])
        return x if projection is None else x @ projection


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="MVTec AD category, or 'synthetic'")
    parser.add_argument("--backbone", default="filterbank")
    parser.add_argument("--weights")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--only", help="names of variants, separated by ;")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    fitting.NominalSet = CachedNominalSet
    with tempfile.TemporaryDirectory() as folder:
        root = Path(args.data)
        if args.data == "synthetic":
            root = make_dataset(Path(folder) / "woven", seed=0)
        (category,) = find_categories(root)
        names = args.only.split(";") if args.only else list(VARIANTS)
        rows = {}
        print("| configuration | image AUROC | pixel AUROC | AUPRO | eps | model MB |")
        print("|---|---|---|---|---|---|", flush=True)
        for name in names:
            runs = []
            for seed in map(int, args.seeds.split(",")):
                model = CachedNPad(args.backbone, weights=args.weights, seed=seed, **VARIANTS[name])
                result = evaluate(model, category, progress=False)
                path = Path(folder) / "model.npad"
                model.save(path)
                runs.append(
                    {metric: result.metrics[metric] for metric in METRICS}
                    | {"eps": model.eps_, "model_mb": path.stat().st_size / 1e6}
                )
            rows[name] = runs
            means = [f"{fmean(run[metric] for run in runs):.4f}" for metric in METRICS]
            eps = "none" if runs[0]["eps"] is None else f"{fmean(run['eps'] for run in runs):.1e}"
            size = f"{runs[0]['model_mb']:.0f}"
            print("| " + " | ".join([name, *means, eps, size]) + " |", flush=True)
            settings = {"data": root.name, "backbone": args.backbone, "seeds": args.seeds}
            args.out.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
