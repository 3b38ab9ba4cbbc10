"""Registers the CPU kernels of the extension for the ops."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from npad.ops import _outputs, _progress
from npad.ops._extension import bands, core, dense, integers, level_table, passed
from npad.ops._schemas import register
from npad.ops.axes import as_rows, fixed_axes, leading_axes
from npad.ops.packed import store

NEW_MEMORY = 32 << 20  # bytes; as much is not kept by the allocator but cleared anew by the system


def _run(op: str, *arguments: Any) -> None:
    getattr(core, op)(*passed(arguments), torch.get_num_threads())


def _large(output: Tensor) -> Tensor:
    """An output that may be large, of which nothing has been written."""
    if output.nbytes >= NEW_MEMORY:
        core.use_huge_pages(output.data_ptr(), output.nbytes)
    return output


def embed(levels: list[Tensor], grid: list[int]) -> Tensor:
    # Rows along which nothing is side by side are rare: a copy serves them.
    levels = [x if 1 in (x.stride(1), x.stride(3)) else x.contiguous() for x in levels]
    embedding = _large(_outputs.embed(levels, grid))
    _run(
        "embed", level_table(levels), len(levels), levels[0].dtype, len(levels[0]), *grid, embedding
    )
    return embedding


def neighborhood_moments(x: Tensor, count: Tensor, mean: Tensor, scatter: Tensor) -> None:
    if x.shape[0] == 0:
        return
    x = dense(x)
    _run("neighborhood_moments", x, len(x), len(count), x.shape[3], count, mean, scatter)


def window_covariance(
    count: Tensor,
    mean: Tensor,
    scatter: Tensor,
    grid: list[int],
    window: int,
    start: int,
    stop: int,
) -> tuple[Tensor, Tensor]:
    count, mean, scatter = count.contiguous(), mean.contiguous(), scatter.contiguous()
    outputs = _outputs.window_covariance(count, mean, scatter, grid, window, start, stop)
    _run(
        "window_covariance", count, mean, scatter, *grid, mean.shape[1], window, start, stop,
        *outputs,
    )  # fmt: skip
    return outputs


def pack_factor(factor: Tensor, dtype: torch.dtype) -> Tensor:
    factor = factor.contiguous()
    packed = _outputs.pack_factor(factor, torch.float32)
    _run("pack_factor", factor, *factor.shape[:2], packed)
    return store(packed, factor.shape[1], dtype)


def inverse_cholesky(covariance: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    covariance = covariance.contiguous()
    packed, info = _outputs.inverse_cholesky(covariance, torch.float32)
    _run("inverse_cholesky", covariance, *covariance.shape[:2], packed, info)
    return store(packed, covariance.shape[1], dtype), info


def mahalanobis(
    x: Tensor,
    mean: Tensor,
    factor: Tensor,
    grid: list[int],
    window: int,
    prefix: int | None = None,
) -> Tensor:
    x, mean, factor = dense(x), mean.contiguous(), factor.contiguous()
    distance = _outputs.mahalanobis(x, mean, factor, grid, window, prefix)
    _run(
        "mahalanobis", x, len(x), *grid, x.shape[3], mean, factor, factor.dtype, window,
        prefix or 0, distance,
    )  # fmt: skip
    return distance


def centroid_index(centroids: Tensor) -> Tensor:
    centroids = centroids.contiguous()
    n_axes = core.centroid_index_axes(centroids.shape[1])
    index = _outputs.centroid_index(centroids)
    found = leading_axes(centroids, n_axes)
    if found is None:
        return index.zero_()  # which is no index
    mean, axes = found
    # A random rotation leaves no axis with more of the variance than the others.
    mixed = axes @ fixed_axes(axes.shape[1], axes.shape[1])
    rows = as_rows(mixed, n_axes, like=centroids)
    _run("centroid_index", centroids, *centroids.shape, mean, rows, index)
    return index


def nearest_centroid(
    x: Tensor, centroids: Tensor, index: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    x, centroids = x.contiguous(), centroids.contiguous()
    # A program that was exported on a GPU brings that GPU's.
    index = index.contiguous() if index is not None and index.dtype == torch.int32 else None
    outputs = _outputs.nearest_centroid(x, centroids)
    _run("nearest_centroid", x, len(x), centroids, *centroids.shape, index, *outputs)
    return outputs


def farthest_first(points: Tensor, n_centroids: int, first: int) -> tuple[Tensor, Tensor]:
    points = points.contiguous()
    mean = axes = None
    n_axes = core.farthest_first_axes()
    found = leading_axes(points, n_axes)
    if found is not None:
        mean, axes = found[0], as_rows(found[1], n_axes, like=points)
    outputs = _outputs.farthest_first(points, n_centroids, first)
    _run(
        "farthest_first", points, *points.shape, n_centroids, first, mean, axes, *outputs,
        _progress.current.get(),
    )  # fmt: skip
    return outputs


def anomaly_map(
    mahalanobis: Tensor | None,
    euclidean: Tensor | None,
    product: bool,
    coefficients: list[float],
    size: list[int],
    sigma: float,
) -> tuple[Tensor, Tensor]:
    m, e = (None if x is None else x.contiguous() for x in (mahalanobis, euclidean))
    x = cast(Tensor, e if m is None else m)
    maps, scores = _outputs.anomaly_map(m, e, product, coefficients, size, sigma)
    _run(
        "anomaly_map", m, e, product, *coefficients, *x.shape, *bands(x, size, sigma), *size,
        _large(maps), scores,
    )  # fmt: skip
    return maps, scores


def resize_maps(maps: Tensor, heights: list[int], widths: list[int]) -> Tensor:
    maps = maps.contiguous()
    resized = _large(_outputs.resize_maps(maps, heights, widths))
    _run("resize_maps", maps, *maps.shape, integers(heights), integers(widths), resized)
    return resized


if core is not None:
    register(
        "CPU",
        embed,
        neighborhood_moments,
        window_covariance,
        pack_factor,
        inverse_cholesky,
        mahalanobis,
        centroid_index,
        nearest_centroid,
        farthest_first,
        anomaly_map,
        resize_maps,
    )
