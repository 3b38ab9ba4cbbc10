"""How many centroids a bound by principal axes leaves: what an index for nearest_centroid has to go on.

    python bench/study_axes.py MODEL IMAGE... [--weights FILE]

MODEL is a file that `npad fit` wrote. With the coordinates along the first axes of the centroids and
the norm t of the rest, || x - c ||^2 >= || Q^T (x - c) ||^2 + (t_x - t_c)^2. Prints for each image the
centroids, on average over its embeddings, whose bound is below the distance to the nearest, and that
distance over the embedding's distance from the mean.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from npad import NPad

AXES = (16, 32, 48, 64, 96, 128, 192)


def left(x: Tensor, centroids: Tensor, axes: Tensor) -> float:
    """Centroids (K, C) that the bound along `axes` (C, A) leaves of each x (N, C), on average."""
    heads = []
    for points in (x, centroids):
        coordinates = points @ axes
        rest = points.square().sum(1) - coordinates.square().sum(1)
        heads.append(torch.cat([coordinates, rest.clamp(min=0).sqrt()[:, None]], 1))
    bound, distance = torch.cdist(*heads), torch.cdist(x, centroids)
    return float((bound < distance.min(1, keepdim=True).values).sum(1).double().mean())


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("images", nargs="+")
    parser.add_argument("--weights")
    args = parser.parse_args()
    model = NPad.load(args.model, weights=args.weights)
    (centroids,) = (m.centroids.double() for m in model.members_ if m.centroids is not None)
    mean = centroids.mean(0)
    centroids = centroids - mean
    axes = torch.linalg.eigh(centroids.T @ centroids).eigenvectors.flip(1)
    chosen = [n for n in AXES if n < len(axes)]
    print("| axes |", " | ".join(map(str, chosen)), "| distance of the nearest |")
    print("|---" * (len(chosen) + 2) + "|")
    for image in args.images:
        x = model.embed(image).flatten(0, 2).double() - mean
        counts = [f"{left(x, centroids, axes[:, :n]):.1f}" for n in chosen]
        nearest = torch.cdist(x, centroids).min(1).values / x.norm(dim=1)
        print(f"| {Path(image).name} |", " | ".join(counts), f"| {nearest.median():.2f} |")


if __name__ == "__main__":
    main()
