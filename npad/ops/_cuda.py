"""Registers the CUDA kernels of the extension for the ops, where it has them and a driver runs them."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

from npad import devices
from npad.ops._cpu import core, dense, factor_type, leading_axes, level_tuples
from npad.ops.reference import axis_band, packed_size

AXES_SHARE = 0.5  # of the free memory, which what makes farthest_first fast may take

cuda: Any = getattr(core, "cuda", None)


def _run(op: str, x: Tensor, *arguments: Tensor | object) -> None:
    """Launch on the device of x and the stream that is current there; tensors become addresses."""
    with torch.cuda.device(x.device):
        getattr(cuda, op)(
            x.device.index,
            *(a.data_ptr() if isinstance(a, Tensor) else a for a in arguments),
            torch.cuda.current_stream().cuda_stream,
        )


def embed(levels: list[Tensor], grid: list[int]) -> Tensor:
    first = levels[0]
    channels = sum(x.shape[1] for x in levels)
    embedding = first.new_empty(len(first), *grid, channels, dtype=torch.float32)
    _run(
        "embed", first, level_tuples(levels), factor_type(first.dtype), len(first), *grid, embedding
    )
    return embedding


def neighborhood_moments(x: Tensor, count: Tensor, mean: Tensor, scatter: Tensor) -> None:
    x = dense(x)
    _run("neighborhood_moments", x, x, len(x), len(count), x.shape[3], count, mean, scatter)


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
    channels = mean.shape[1]
    window_mean = mean.new_empty(stop - start, channels)
    covariance = mean.new_empty(stop - start, channels, channels)
    _run(
        "window_covariance", mean, count, mean, scatter, *grid, channels, window, start, stop,
        window_mean, covariance,
    )  # fmt: skip
    return window_mean, covariance


def pack_factor(factor: Tensor, dtype: torch.dtype) -> Tensor:
    factor = factor.contiguous()
    channels = factor.shape[1]
    packed = factor.new_empty(len(factor), packed_size(channels), dtype=dtype)
    _run("pack_factor", factor, factor, len(factor), channels, packed, factor_type(dtype))
    return packed


def inverse_cholesky(covariance: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    covariance = covariance.contiguous()
    count, channels = covariance.shape[:2]
    size = cuda.inverse_cholesky_workspace(count, channels)
    workspace = covariance.new_empty(size, dtype=torch.uint8)
    packed = covariance.new_empty(count, packed_size(channels), dtype=dtype)
    info = covariance.new_empty(count, dtype=torch.int32)
    _run(
        "inverse_cholesky", covariance, covariance, count, channels, workspace, packed,
        factor_type(dtype), info,
    )  # fmt: skip
    return packed, info


def mahalanobis(x: Tensor, mean: Tensor, factor: Tensor, grid: list[int], window: int) -> Tensor:
    x, mean, factor = dense(x), mean.contiguous(), factor.contiguous()
    distance = x.new_empty(x.shape[:3])
    _run(
        "mahalanobis", x, x, len(x), *grid, x.shape[3], mean, factor, factor_type(factor.dtype),
        window, distance,
    )  # fmt: skip
    return distance


def nearest_centroid(
    x: Tensor, centroids: Tensor, index: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The index is for the CPU: here matrix instructions rank the centroids themselves."""
    x, centroids = x.contiguous(), centroids.contiguous()
    sizes = len(x), len(centroids), x.shape[1]
    workspace = x.new_empty(cuda.nearest_centroid_workspace(*sizes), dtype=torch.uint8)
    distance, nearest = x.new_empty(len(x)), x.new_empty(len(x), dtype=torch.int64)
    _run(
        "nearest_centroid", x, x, len(x), centroids, len(centroids), x.shape[1], workspace,
        distance, nearest,
    )  # fmt: skip
    return distance, nearest


def farthest_first(points: Tensor, n_centroids: int, first: int) -> tuple[Tensor, Tensor]:
    points = points.contiguous()
    n_axes = cuda.farthest_first_axes(points.shape[1])
    size = cuda.farthest_first_workspace(len(points), n_axes)
    free = devices.free_bytes(points.device)
    fits = free is None or size < AXES_SHARE * free
    found = leading_axes(points, n_axes - 1) if n_axes and fits else None
    mean: Tensor | int = 0  # null: every point is measured
    axes: Tensor | int = 0
    if found is not None:
        mean, columns = found
        axes = torch.nn.functional.pad(columns.T, (0, 0, 1, 0)).to(points).contiguous()
    else:
        size = cuda.farthest_first_workspace(len(points), 0)
    workspace = points.new_empty(size, dtype=torch.uint8)
    index, radius = points.new_empty(n_centroids, dtype=torch.int64), points.new_empty(n_centroids)
    _run(
        "farthest_first", points, points, *points.shape, n_centroids, first, mean, axes, workspace,
        index, radius,
    )  # fmt: skip
    return index, radius


@cache
def _axis_band(n: int, size: int, sigma: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """On the device, and kept: a captured graph reads it for as long as it is replayed."""
    first, taps = axis_band(n, size, sigma)
    return first.to(device), taps.to(device)


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
    n, h, w = x.shape
    row_first, row_taps = _axis_band(h, size[0], sigma, x.device)
    column_first, column_taps = _axis_band(w, size[1], sigma, x.device)
    workspace = x.new_empty(cuda.anomaly_map_workspace(n, h, w), dtype=torch.uint8)
    maps, scores = x.new_empty(n, *size), x.new_empty(n)
    _run(
        "anomaly_map", x, 0 if m is None else m, 0 if e is None else e, product, *coefficients,
        n, h, w, row_first, row_taps, row_taps.shape[1], column_first, column_taps,
        column_taps.shape[1], *size, workspace, maps, scores,
    )  # fmt: skip
    return maps, scores


def resize_maps(maps: Tensor, heights: list[int], widths: list[int]) -> Tensor:
    maps = maps.contiguous()
    resized = maps.new_empty(sum(h * w for h, w in zip(heights, widths, strict=True)))
    _run("resize_maps", maps, maps, *maps.shape, heights, widths, resized)
    return resized


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def register() -> bool:
    """Register the CUDA kernels with PyTorch, unless the driver is too old for them."""
    if cuda is None or cuda.driver_version() == 0:
        return False
    driver, runtime = cuda.driver_version(), cuda.runtime_version()
    if driver // 1000 < runtime // 1000:
        warnings.warn(
            f"npad: its CUDA kernels need a driver for CUDA {_version(runtime)}, this one is for "
            f"{_version(driver)}; on the GPU the slower PyTorch reference runs, the CPU is not "
            "affected. Update the driver, or build npad with an older nvcc",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    for kernel in (
        embed,
        neighborhood_moments,
        window_covariance,
        pack_factor,
        inverse_cholesky,
        mahalanobis,
        nearest_centroid,
        farthest_first,
        anomaly_map,
        resize_maps,
    ):
        torch.library.impl(f"npad::{kernel.__name__}", "CUDA", kernel)
    return True


registered = register()  # otherwise the reference runs on the GPU
