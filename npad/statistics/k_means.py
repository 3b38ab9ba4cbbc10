"""k-means: by faiss where it is installed, and by PyTorch otherwise."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from npad import ops

__all__ = ["k_means", "lloyd", "start"]

ITERATIONS = 25
SAMPLE = 256  # points per centroid that are looked at, as faiss does
CANDIDATES = 3  # per centroid, of which the start is chosen


def k_means(points: Tensor, n: int, seed: int) -> Tensor:
    """Lloyd's k-means, by faiss where it is installed and by PyTorch otherwise.

    Parameters
    ----------
    points : (N, C) float32; a seeded sample of 256 per centroid is used
    n : number of centroids, at most N
    seed : of the sample and the start

    Returns
    -------
    (n, C) float32
    """
    generator = torch.Generator().manual_seed(seed)
    if len(points) > SAMPLE * n:
        chosen = torch.randperm(len(points), generator=generator)[: SAMPLE * n]
        points = points[chosen.sort().values.to(points.device)]
    faiss = _faiss()
    if faiss is not None:
        engine = faiss.Kmeans(
            points.shape[1], n, niter=ITERATIONS, seed=seed, min_points_per_centroid=1
        )
        engine.train(points.cpu().numpy())
        return torch.from_numpy(engine.centroids).to(points.device)
    return lloyd(points, n, generator)


def lloyd(points: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """k-means in PyTorch; a cluster that empties restarts at the point farthest from its centroid."""
    centroids = points[start(points, n, generator)]
    for _ in range(ITERATIONS):
        distance, index = ops.nearest_centroid(points, centroids)
        count = torch.bincount(index, minlength=n)
        total = torch.zeros_like(centroids).index_add_(0, index, points)
        moved = total / count.clamp(min=1)[:, None]
        empty = (count == 0).nonzero().flatten()
        moved[empty] = points[distance.argsort(descending=True)[: len(empty)]]
        if torch.equal(moved, centroids):
            break
        centroids = moved
    return centroids


def start(points: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Positions of the points to start k-means from: (n,) int64, of different points where there are.

    k-means|| (Bahmani et al., *Scalable k-means++*, 2012): candidates are drawn in a few passes, then
    greedy k-means++ chooses among them, each weighted by the points that it is nearest to. A start
    at the farthest points would give every outlier a centroid that never leaves it.
    """
    few = _candidates(points, min(CANDIDATES * n, len(points)), generator)
    x = points[few]
    share = torch.bincount(ops.nearest_centroid(points, x)[1], minlength=len(x)).to(x)
    n_trials = 2 + int(math.log(n))  # as scikit-learn has it
    chosen = [0]
    cost = torch.cdist(x[:1], x)[0].square()
    while len(chosen) < n:
        total = (share * cost).double().cumsum(0)
        draw = torch.rand(n_trials, generator=generator, dtype=torch.float64).to(total) * total[-1]
        trials = torch.searchsorted(total, draw, right=True).clamp(max=len(x) - 1)
        costs = cost.minimum(torch.cdist(x[trials], x).square())
        best = int((costs @ share).argmin())
        chosen.append(int(trials[best]))
        cost = costs[best]
    return few[chosen]


def _candidates(points: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Positions of n points, drawn in proportion to the squared distance from those drawn before.

    As many as there are already are drawn at a time.
    """
    new = torch.randint(len(points), (1,), generator=generator)
    chosen, weight = new, torch.full((len(points),), torch.inf)
    while len(chosen) < n:
        distance, _ = ops.nearest_centroid(points, points[new.to(points.device)])
        weight = weight.minimum(distance.square().cpu())
        weight[new] = -1.0  # never again
        # Draws without replacement: the largest of weight over exponential variates.
        noise = torch.empty_like(weight).exponential_(generator=generator)
        new = (weight / noise).topk(min(len(chosen), n - len(chosen))).indices
        chosen = torch.cat([chosen, new])
    return chosen.to(points.device)


def _faiss() -> Any:
    try:
        import faiss  # noqa: PLC0415  (optional)
    except ImportError:
        return None
    return faiss
