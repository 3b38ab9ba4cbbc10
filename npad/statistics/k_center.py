"""Greedy k-center: the farthest point becomes the next centroid."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from npad import ops
from npad.ops.axes import random_axes

__all__ = ["k_center"]


def k_center(
    points: Tensor,
    n: int,
    *,
    seed: int = 0,
    projection: int | None = None,
    advance: Callable[[int], None] | None = None,
) -> tuple[Tensor, float]:
    """A `npad.nominal_methods.Choose`: centroids are points, and the radius is the covering radius."""
    done = 0

    def report(now: int, total: int) -> None:
        nonlocal done
        if advance is not None:
            advance(now - done)
        done = now

    with ops.report_progress(report):
        index, radius = ops.farthest_first(_projected(points, projection, seed), n)
    return points[index], float(radius[-1])


def _projected(points: Tensor, dimensions: int | None, seed: int) -> Tensor:
    """Random orthogonal projection, scaled to keep distances on average.

    Drawn on the CPU, so that it is the same for every device.
    """
    channels = points.shape[1]
    if dimensions is None or dimensions >= channels:
        return points
    generator = torch.Generator().manual_seed(seed)
    axes = random_axes(channels, dimensions, generator, torch.float64)
    matrix = axes * (channels / dimensions) ** 0.5
    return points @ matrix.to(points)
