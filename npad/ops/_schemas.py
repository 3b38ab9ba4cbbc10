"""The ops as PyTorch knows them: schemas, shapes for tracing, the reference as the last resort."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from npad.ops import reference
from npad.ops.reference import centroid_index_size, packed_size

_SCHEMAS = {
    "embed": "(Tensor[] levels, int[2] grid) -> Tensor",
    "neighborhood_moments": "(Tensor x, Tensor(a!) count, Tensor(b!) mean, Tensor(c!) scatter) -> ()",
    "window_covariance": "(Tensor count, Tensor mean, Tensor scatter, int[2] grid, int window, "
    "int start, int stop) -> (Tensor, Tensor)",
    "pack_factor": "(Tensor factor, ScalarType dtype) -> Tensor",
    "inverse_cholesky": "(Tensor covariance, ScalarType dtype) -> (Tensor, Tensor)",
    "mahalanobis": "(Tensor x, Tensor mean, Tensor factor, int[2] grid, int window) -> Tensor",
    "centroid_index": "(Tensor centroids) -> Tensor",
    "nearest_centroid": "(Tensor x, Tensor centroids, Tensor? index=None) -> (Tensor, Tensor)",
    "farthest_first": "(Tensor points, int n_centroids, int first) -> (Tensor, Tensor)",
    "anomaly_map": "(Tensor? mahalanobis, Tensor? euclidean, bool product, float[3] coefficients, "
    "int[2] size, float sigma) -> (Tensor, Tensor)",
    "resize_maps": "(Tensor maps, int[] heights, int[] widths) -> Tensor",
}
for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"npad::{_name}", _schema)
    torch.library.impl(f"npad::{_name}", "CompositeExplicitAutograd", getattr(reference, _name))


@torch.library.register_fake("npad::embed")
def _(levels: list[Tensor], grid: list[int]) -> Tensor:
    channels = sum(level.shape[1] for level in levels)
    return levels[0].new_empty(levels[0].shape[0], *grid, channels, dtype=torch.float32)


@torch.library.register_fake("npad::neighborhood_moments")
def _(x: Tensor, count: Tensor, mean: Tensor, scatter: Tensor) -> None:
    return None


@torch.library.register_fake("npad::window_covariance")
def _(
    count: Tensor,
    mean: Tensor,
    scatter: Tensor,
    grid: list[int],
    window: int,
    start: int,
    stop: int,
) -> tuple[Tensor, Tensor]:
    channels = mean.shape[1]
    rows = stop - start
    return mean.new_empty(rows, channels), mean.new_empty(rows, channels, channels)


@torch.library.register_fake("npad::pack_factor")
def _(factor: Tensor, dtype: torch.dtype) -> Tensor:
    return factor.new_empty(factor.shape[0], packed_size(factor.shape[1]), dtype=dtype)


@torch.library.register_fake("npad::inverse_cholesky")
def _(covariance: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    count, channels = covariance.shape[:2]
    packed = covariance.new_empty(count, packed_size(channels), dtype=dtype)
    return packed, covariance.new_empty(count, dtype=torch.int32)


@torch.library.register_fake("npad::mahalanobis")
def _(x: Tensor, mean: Tensor, factor: Tensor, grid: list[int], window: int) -> Tensor:
    return x.new_empty(x.shape[:3], dtype=torch.float32)


@torch.library.register_fake("npad::centroid_index")
def _(centroids: Tensor) -> Tensor:
    return centroids.new_empty(centroid_index_size(*centroids.shape), dtype=torch.int32)


@torch.library.register_fake("npad::nearest_centroid")
def _(x: Tensor, centroids: Tensor, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0]), x.new_empty(x.shape[0], dtype=torch.int64)


@torch.library.register_fake("npad::farthest_first")
def _(points: Tensor, n_centroids: int, first: int) -> tuple[Tensor, Tensor]:
    return points.new_empty(n_centroids, dtype=torch.int64), points.new_empty(n_centroids)


@torch.library.register_fake("npad::anomaly_map")
def _(
    mahalanobis: Tensor | None,
    euclidean: Tensor | None,
    product: bool,
    coefficients: list[float],
    size: list[int],
    sigma: float,
) -> tuple[Tensor, Tensor]:
    x = cast(Tensor, euclidean if mahalanobis is None else mahalanobis)
    return x.new_empty(x.shape[0], *size), x.new_empty(x.shape[0])


@torch.library.register_fake("npad::resize_maps")
def _(maps: Tensor, heights: list[int], widths: list[int]) -> Tensor:
    return maps.new_empty(sum(h * w for h, w in zip(heights, widths, strict=True)))
