"""What windows, eps and fusion do to the maps: one fit, every combination of distances.

    python bench/study_maps.py DIR --backbone resnet18 --weights FILE

DIR is an MVTec AD category. The moments are accumulated once; each row joins a Mahalanobis
map (training window, eps, evaluation window) and the Euclidean map, smoothed and measured at the
model's input size.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from torch import Tensor

from npad import NPad, ops
from npad.evaluation.datasets import find_categories, read_mask
from npad.evaluation.metrics import image_metrics, pixel_metrics
from npad.scoring.fusion import fusion_arguments, smoothing_sigma
from npad.statistics.gaussian import NeighborhoodGaussian
from npad.statistics.nominal_set import NominalSet

SIZE = (256, 256)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("--backbone", default="filterbank")
    parser.add_argument("--weights")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    (category,) = find_categories(args.data)
    model = NPad(args.backbone, weights=args.weights, seed=args.seed)

    def embed(paths: list[object]) -> Tensor:
        source = model._open(paths, False)
        return torch.cat([model._embed(batch.images) for batch in source.batches()])

    train, test = embed(category.train), embed([s.path for s in category.test])
    grid = tuple(train.shape[1:3])
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(args.seed))
    held_out = train[order[: min(64, len(train) // 10)]]
    gaussian = NeighborhoodGaussian(grid, train.shape[3])
    for batch in train[order[len(held_out) :]].split(32):
        gaussian.update(batch)
    chosen = {}
    for window in (1, 3):
        gaussian.window = window
        chosen[window] = gaussian.choose_eps(held_out)
    gaussian.update(held_out)
    nominal = NominalSet(seed=args.seed).update(train).finalize()
    euclidean = torch.cat([nominal.distance(x) for x in test.split(16)])

    labels = np.array([s.is_anomalous for s in category.test])
    masks = []
    for sample in category.test:
        mask = np.zeros(SIZE, dtype=bool)
        if sample.mask_path is not None:
            own = read_mask(sample.mask_path)
            rows, columns = (((np.arange(256) + 0.5) * n / 256).astype(int) for n in own.shape)
            mask = own[rows[:, None], columns]
        masks.append(mask)

    def row(name: str, fusion: str, mahalanobis: Tensor | None, weight: float = 0.4) -> None:
        arguments = fusion_arguments(mahalanobis, euclidean, fusion, weight)
        maps, scores = ops.anomaly_map(*arguments, SIZE, smoothing_sigma(SIZE))
        image = image_metrics(labels, scores.double().numpy())
        pixel = pixel_metrics(masks, list(maps.numpy()))
        values = image["auroc"], pixel["pixel_auroc"], pixel["aupro"]
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
