"""What each op returns, not filled in: shapes for tracing, memory for the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from npad.ops.packed import stored_size
from npad.ops.reference import centroid_index_dtype, centroid_index_size


def embed(levels: Sequence[Tensor], grid: Sequence[int]) -> Tensor:
    channels = sum(level.shape[1] for level in levels)
    return levels[0].new_empty(levels[0].shape[0], *grid, channels, dtype=torch.float32)


def neighborhood_moments(x: Tensor, count: Tensor, mean: Tensor, scatter: Tensor) -> None:
    return None


def window_covariance(
    count: Tensor,
    mean: Tensor,
    scatter: Tensor,
    grid: Sequence[int],
    window: int,
    start: int,
    stop: int,
) -> tuple[Tensor, Tensor]:
    channels = mean.shape[1]
    rows = stop - start
    return mean.new_empty(rows, channels), mean.new_empty(rows, channels, channels)


def pack_factor(factor: Tensor, dtype: torch.dtype) -> Tensor:
    return factor.new_empty(factor.shape[0], stored_size(factor.shape[1], dtype), dtype=dtype)


def inverse_cholesky(covariance: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    packed = pack_factor(covariance, dtype)
    return packed, covariance.new_empty(covariance.shape[0], dtype=torch.int32)


def mahalanobis(
    x: Tensor,
    mean: Tensor,
    factor: Tensor,
    grid: Sequence[int],
    window: int,
    prefix: int | None = None,
) -> Tensor:
    shape = x.shape[:3] if prefix is None else (2, *x.shape[:3])
    return x.new_empty(shape, dtype=torch.float32)


def centroid_index(centroids: Tensor) -> Tensor:
    (k, channels), dtype = centroids.shape, centroid_index_dtype(centroids.device)
    return centroids.new_empty(centroid_index_size(k, channels, dtype), dtype=dtype)


def nearest_centroid(
    x: Tensor, centroids: Tensor, index: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0]), x.new_empty(x.shape[0], dtype=torch.int64)


def farthest_first(points: Tensor, n_centroids: int, first: int) -> tuple[Tensor, Tensor]:
    return points.new_empty(n_centroids, dtype=torch.int64), points.new_empty(n_centroids)


def anomaly_map(
    mahalanobis: Tensor | None,
    euclidean: Tensor | None,
    product: bool,
    coefficients: Sequence[float],
    size: Sequence[int],
    sigma: float,
) -> tuple[Tensor, Tensor]:
    x = cast(Tensor, euclidean if mahalanobis is None else mahalanobis)
    return x.new_empty(x.shape[0], *size), x.new_empty(x.shape[0])


def resize_maps(maps: Tensor, heights: Sequence[int], widths: Sequence[int]) -> Tensor:
    return maps.new_empty(sum(h * w for h, w in zip(heights, widths, strict=True)))
