"""Registers the kernels of the extension for the ops; its only user."""

from __future__ import annotations

import warnings
from typing import Any, cast

import torch
from torch import Tensor

from npad import ops
from npad.reference import axis_band, centroid_index_size, packed_size

NEW_MEMORY = 32 << 20  # bytes; as much is not kept by the allocator but cleared anew by the system
INDEX_SAMPLE = 4096  # centroids, at most, that choose the axes of an index
INDEX_ITERATIONS = 2
INDEX_LARGEST = 1e14  # deviations whose squares, summed, stay far from overflow

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
    sample = centroids[:: -(-k // INDEX_SAMPLE)]
    mean = sample.mean(0)
    deviation = sample - mean
    if bool(deviation.abs().max() < INDEX_LARGEST):  # else it stays zero, which is no index
        axes = _mixed_axes(deviation, core.centroid_index_axes(channels))
        core.centroid_index(
            centroids.data_ptr(), k, channels, mean.data_ptr(), axes.data_ptr(), index.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
    return index


def _mixed_axes(deviation: Tensor, n_axes: int) -> Tensor:
    """(n_axes, C): orthonormal axes of about the space in which the rows (S, C) vary most.

    Power iteration from random directions (Halko, Martinsson, Tropp, *Finding structure with
    randomness*, 2011). A random rotation at the end leaves no axis with more of the variance than
    the others. Axes above C are zero.
    """
    channels = deviation.shape[1]
    rank = min(n_axes, channels)
    generator = torch.Generator().manual_seed(0)

    def random(rows: int) -> Tensor:
        return torch.randn(rows, rank, generator=generator, dtype=torch.float64)

    axes = torch.linalg.qr(random(channels)).Q
    for _ in range(INDEX_ITERATIONS if rank < channels else 0):
        product = deviation.T @ (deviation @ axes.to(deviation))
        axes = torch.linalg.qr(product.double()).Q
    mixed = (axes @ torch.linalg.qr(random(rank)).Q).to(deviation)
    return torch.nn.functional.pad(mixed.T, (0, 0, 0, n_axes - rank)).contiguous()


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
from npad import _native_cuda  # noqa: E402, F401
