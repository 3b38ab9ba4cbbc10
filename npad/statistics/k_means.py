"""Lloyd's k-means, by faiss."""

from __future__ import annotations

import math
from collections.abc import Callable

import faiss
import torch
from torch import Tensor

from npad.nominal_methods import KMEANS_SAMPLE

__all__ = ["k_means"]

ITERATIONS = 25


def k_means(
    points: Tensor,
    n: int,
    *,
    seed: int = 0,
    projection: int | None = None,
    advance: Callable[[int], None] | None = None,
) -> tuple[Tensor, float]:
    """A `npad.nominal_methods.Choose`: means of a seeded sample, without projection and radius.

    faiss works on the CPU here, on whatever device the points are, so that a seed gives the same
    centroids whichever of its packages is installed.
    """
    if len(points) > KMEANS_SAMPLE * n:
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(points), generator=generator, device="cpu")[: KMEANS_SAMPLE * n]
        points = points[chosen.sort().values.to(points.device)]
    engine = faiss.Kmeans(
        points.shape[1], n, niter=ITERATIONS, seed=seed, min_points_per_centroid=1
    )
    engine.train(points.cpu().numpy())
    if advance is not None:
        advance(n)
    return torch.from_numpy(engine.centroids).to(points.device), math.nan
