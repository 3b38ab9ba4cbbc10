"""What windows, eps and fusion do to the maps: one fit, every combination of distances.

    python bench/study_maps.py DIR --backbone resnet18 --weights FILE

DIR is an MVTec AD category. The moments are accumulated once; each row joins a Mahalanobis
map (training window, eps, evaluation window) and the Euclidean map, smoothed and measured at the
model's input size. Prints and keeps nothing.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from embedded import EmbeddedCategory
from torch import Tensor

from npad import NPad, ops
from npad.evaluation.datasets import find_categories
from npad.scoring.fusion import fusion_arguments, smoothing_sigma
from npad.statistics.gaussian import NeighborhoodGaussian
from npad.statistics.nominal_set import NominalSet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("--backbone", default="filterbank")
    parser.add_argument("--weights")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    (category,) = find_categories(args.data)
    with tempfile.TemporaryDirectory() as folder:
        model = NPad(args.backbone, weights=args.weights)
        study(EmbeddedCategory(category, model, Path(folder)), args.seed)


def study(category: EmbeddedCategory, seed: int) -> None:
    train, test, size = category.train, category.test, category.size
    grid = tuple(train.shape[1:3])
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    held_out = train[order[: min(64, len(train) // 10)]]
    gaussian = NeighborhoodGaussian(grid, train.shape[3])
    for batch in train[order[len(held_out) :]].split(32):
        gaussian.update(batch)
    chosen = {}
    for window in (1, 3):
        gaussian.window = window
        chosen[window] = gaussian.choose_eps(held_out)
    gaussian.update(held_out)
    nominal = NominalSet(seed=seed).update(train).finalize()
    euclidean = torch.cat([nominal.distance(x) for x in test.split(16)])

    def row(name: str, fusion: str, mahalanobis: Tensor | None, weight: float = 0.4) -> None:
        arguments = fusion_arguments(mahalanobis, euclidean, fusion, weight)
        maps, scores = ops.anomaly_map(*arguments, size, smoothing_sigma(size))
        values = category.measure(scores, maps).values()
        print(f"| {name} | " + " | ".join(f"{v:.4f}" for v in values) + " |", flush=True)

    print("| map | image AUROC | pixel AUROC | AUPRO |\n|---|---|---|---|")
    row("E", "euclidean", None)
    for window, eps, score_window in [
        *((w, chosen[w], e) for w in (1, 3) for e in (1, 3)),
        *((w, eps, 1) for w in (1, 3) for eps in (3e-4, 1e-3)),
    ]:
        gaussian.window = window
        mean, factor = gaussian.finalize(eps, torch.float16)
        mahalanobis = torch.cat(
            [ops.mahalanobis(x, mean, factor, grid, score_window) for x in test.split(32)]
        )
        name = f"window {window}, eps {eps:.1e}, evaluation window {score_window}"
        row(f"M, {name}", "mahalanobis", mahalanobis)
        weights = (0.3, 0.4, 0.5, 0.7) if (window, eps) == (3, chosen[3]) else (0.4, 0.5)
        for weight in weights:
            row(f"M^{weight} E^{1 - weight:.1f}, {name}", "product", mahalanobis, weight)


if __name__ == "__main__":
    main()
