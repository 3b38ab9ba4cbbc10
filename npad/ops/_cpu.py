"""Registers the kernels of the extension for the ops; its only user."""

from __future__ import annotations

import warnings
from typing import Any, cast

import torch
from torch import Tensor

from npad import ops
from npad.ops.reference import axis_band, centroid_index_size, packed_size

NEW_MEMORY = 32 << 20  # bytes; as much is not kept by the allocator but cleared anew by the system
AXES_SAMPLE = 4096  # rows, at most, that choose axes
AXES_ITERATIONS = 2
AXES_LARGEST = 1e14  # deviations whose squares, summed, stay far from overflow

core: Any
try:
    from npad import _core

    core = _core
except ImportError as error:  # the package still works, only slower
    core = None
    warnings.warn(
        f"npad: the compiled kernels cannot be loaded ({error}); the slow PyTorch reference runs "
        "instead. Rebuild them with: pip install --force-reinstall --no-deps npad",
        RuntimeWarning,
        stacklevel=2,
    )


def info() -> dict[str, Any]:
    """What the extension was built with and what it uses here."""
    if core is None:
        return {"kernels": "PyTorch reference"}
    return {
        "kernels": "native",
        "isa": core.isa(),
        "isas": core.isas(),
        "cuda": core.cuda.architectures if hasattr(core, "cuda") else None,
    }


def dense(x: Tensor) -> Tensor:
    return x.to(torch.float32).contiguous()


def _large(like: Tensor, *shape: int) -> Tensor:
    """Memory of float32 for an output that may be large."""
    out = like.new_empty(shape, dtype=torch.float32)
    if out.nbytes >= NEW_MEMORY:
        core.use_huge_pages(out.data_ptr(), out.nbytes)
    return out


def factor_type(dtype: torch.dtype) -> object:
    return getattr(core.FactorType, str(dtype).removeprefix("torch."))


def level_tuples(levels: list[Tensor]) -> list[tuple[int, ...]]:
    """Address, channels, height, width and strides of each."""
    return [(x.data_ptr(), *x.shape[1:], *x.stride()) for x in levels]


def embed(levels: list[Tensor], grid: list[int]) -> Tensor:
    # Rows along which nothing is side by side are rare: a copy serves them.
    levels = [x if 1 in (x.stride(1), x.stride(3)) else x.contiguous() for x in levels]
    batch, channels = len(levels[0]), sum(x.shape[1] for x in levels)
    embedding = _large(levels[0], batch, *grid, channels)
    core.embed(
        level_tuples(levels), factor_type(levels[0].dtype), batch, *grid, embedding.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return embedding


def neighborhood_moments(x: Tensor, count: Tensor, mean: Tensor, scatter: Tensor) -> None:
    if x.shape[0] == 0:
        return
    x = dense(x)
    core.neighborhood_moments(
        x.data_ptr(), x.shape[0], len(count), x.shape[3], count.data_ptr(), mean.data_ptr(),
        scatter.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip


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
    core.window_covariance(
        count.data_ptr(), mean.data_ptr(), scatter.data_ptr(), *grid, channels, window, start, stop,
        window_mean.data_ptr(), covariance.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return window_mean, covariance


def pack_factor(factor: Tensor, dtype: torch.dtype) -> Tensor:
    factor = factor.contiguous()
    packed = factor.new_empty(len(factor), packed_size(factor.shape[1]))
    core.pack_factor(
        factor.data_ptr(), len(factor), factor.shape[1], packed.data_ptr(), torch.get_num_threads()
    )
    return packed.to(dtype)


def inverse_cholesky(covariance: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    covariance = covariance.contiguous()
    count, channels = covariance.shape[:2]
    packed = covariance.new_empty(count, packed_size(channels))
    info = covariance.new_empty(count, dtype=torch.int32)
    core.inverse_cholesky(
        covariance.data_ptr(), count, channels, packed.data_ptr(), info.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return packed.to(dtype), info


def mahalanobis(x: Tensor, mean: Tensor, factor: Tensor, grid: list[int], window: int) -> Tensor:
    x, mean, factor = dense(x), mean.contiguous(), factor.contiguous()
    distance = x.new_empty(x.shape[:3])
    core.mahalanobis(
        x.data_ptr(), len(x), *grid, x.shape[3], mean.data_ptr(), factor.data_ptr(),
        factor_type(factor.dtype), window, distance.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return distance


def centroid_index(centroids: Tensor) -> Tensor:
    centroids = centroids.contiguous()
    k, channels = centroids.shape
    index = centroids.new_zeros(centroid_index_size(k, channels), dtype=torch.int32)
    n_axes = core.centroid_index_axes(channels)
    found = leading_axes(centroids, n_axes)
    if found is not None:  # else it stays zero, which is no index
        mean, axes = found
        rank = axes.shape[1]
        # A random rotation leaves no axis with more of the variance than the others.
        mixed = (axes @ _random_axes(rank, rank)).to(centroids)
        axes = torch.nn.functional.pad(mixed.T, (0, 0, 0, n_axes - rank)).contiguous()
        core.centroid_index(
            centroids.data_ptr(), k, channels, mean.data_ptr(), axes.data_ptr(), index.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
    return index


def _random_axes(channels: int, rank: int) -> Tensor:
    """(channels, rank) float64: orthonormal columns, the same on every call."""
    generator = torch.Generator().manual_seed(0)
    gaussian = torch.randn(channels, rank, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(gaussian).Q


def leading_axes(rows: Tensor, n_axes: int) -> tuple[Tensor, Tensor] | None:
    """Mean (C,) of a sample of the rows (N, C), and about its leading principal axes, leading first.

    Axes are orthonormal columns, (C, min(n_axes, C)) float64 on the CPU, however coarse the matrix
    products of the device are. None where squares of deviations from the mean could overflow.

    Power iteration from random directions (Halko, Martinsson, Tropp, *Finding structure with
    randomness*, 2011); the last product's singular vectors put them in order.
    """
    channels = rows.shape[1]
    sample = rows
    if len(rows) > AXES_SAMPLE:  # one of each stretch: steps could keep to one column of a grid
        generator = torch.Generator().manual_seed(0)
        place = torch.rand(AXES_SAMPLE, generator=generator, dtype=torch.float64)
        place += torch.arange(AXES_SAMPLE)
        sample = rows[(place * (len(rows) / AXES_SAMPLE)).long().to(rows.device)]
    mean = sample.mean(0)
    deviation = sample - mean
    if not bool(deviation.abs().max() < AXES_LARGEST):
        return None
    axes = _random_axes(channels, min(n_axes, channels))
    for _ in range(AXES_ITERATIONS):
        product = deviation.T @ (deviation @ axes.to(deviation))
        axes, triangle = torch.linalg.qr(product.cpu().double())
    return mean, axes @ torch.linalg.svd(triangle).U


def nearest_centroid(
    x: Tensor, centroids: Tensor, index: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    x, centroids = x.contiguous(), centroids.contiguous()
    index = index.contiguous() if index is not None else None
    distance, nearest = x.new_empty(len(x)), x.new_empty(len(x), dtype=torch.int64)
    core.nearest_centroid(
        x.data_ptr(), len(x), centroids.data_ptr(), len(centroids), x.shape[1],
        index.data_ptr() if index is not None else 0, distance.data_ptr(), nearest.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return distance, nearest


def farthest_first(points: Tensor, n_centroids: int, first: int) -> tuple[Tensor, Tensor]:
    points = points.contiguous()
    index, radius = points.new_empty(n_centroids, dtype=torch.int64), points.new_empty(n_centroids)
    core.farthest_first(
        points.data_ptr(), *points.shape, n_centroids, first, index.data_ptr(), radius.data_ptr(),
        torch.get_num_threads(), ops.progress.get(),
    )  # fmt: skip
    return index, radius


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
    row_first, row_taps = axis_band(h, size[0], sigma)
    column_first, column_taps = axis_band(w, size[1], sigma)
    maps, scores = _large(x, n, *size), x.new_empty(n)
    core.anomaly_map(
        0 if m is None else m.data_ptr(), 0 if e is None else e.data_ptr(), product, *coefficients,
        n, h, w, row_first.data_ptr(), row_taps.data_ptr(), row_taps.shape[1],
        column_first.data_ptr(), column_taps.data_ptr(), column_taps.shape[1], *size,
        maps.data_ptr(), scores.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return maps, scores


def resize_maps(maps: Tensor, heights: list[int], widths: list[int]) -> Tensor:
    maps = maps.contiguous()
    resized = _large(maps, sum(h * w for h, w in zip(heights, widths, strict=True)))
    core.resize_maps(
        maps.data_ptr(), *maps.shape, heights, widths, resized.data_ptr(), torch.get_num_threads()
    )
    return resized


def register() -> None:
    """Register the CPU kernels with PyTorch."""
    if core is None:
        return
    for kernel in (
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
    ):
        torch.library.impl(f"npad::{kernel.__name__}", "CPU", kernel)


register()

# After the CPU kernels, whose module it takes from here.
from npad.ops import _cuda  # noqa: E402, F401
