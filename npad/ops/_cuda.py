"""Registers the CUDA kernels of the extension for the ops, where it has them and a driver runs them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any, cast

import torch
from torch import Tensor

from npad import devices
from npad.ops import _outputs, _schemas, reference, trust
from npad.ops._extension import aligned, bands, cuda, dense, integers, level_table, passed
from npad.ops.axes import as_rows, leading_axes
from npad.ops.packed import store

AXES_SHARE = 0.5  # of the free memory, which what makes farthest_first fast may take


def _run(op: str, x: Tensor, *arguments: Any) -> None:
    """Launch on the device of x and the stream that is current there."""
    with torch.cuda.device(x.device):
        stream = torch.cuda.current_stream().cuda_stream
        getattr(cuda, op)(x.device.index, *passed(arguments), stream)


def _workspace(like: Tensor, n_bytes: int) -> Tensor:
    return like.new_empty(n_bytes, dtype=torch.uint8)


def embed(levels: list[Tensor], grid: list[int]) -> Tensor:
    first = levels[0]
    embedding = _outputs.embed(levels, grid)
    _run(
        "embed", first, level_table(levels), len(levels), first.dtype, len(first), *grid, embedding
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
    count, mean, scatter = count.contiguous(), mean.contiguous(), aligned(scatter)
    outputs = _outputs.window_covariance(count, mean, scatter, grid, window, start, stop)
    _run(
        "window_covariance", mean, count, mean, scatter, *grid, mean.shape[1], window, start, stop,
        *outputs,
    )  # fmt: skip
    return outputs


def pack_factor(factor: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype == torch.int8:
        return store(pack_factor(factor, torch.float32), factor.shape[1], dtype)
    factor = factor.contiguous()
    packed = _outputs.pack_factor(factor, dtype)
    _run("pack_factor", factor, factor, *factor.shape[:2], packed, dtype)
    return packed


def inverse_cholesky(covariance: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if dtype == torch.int8:
        packed, info = inverse_cholesky(covariance, torch.float32)
        return store(packed, covariance.shape[1], dtype), info
    covariance = covariance.contiguous()
    sizes = covariance.shape[:2]
    workspace = _workspace(covariance, cuda.inverse_cholesky_workspace(*sizes))
    packed, info = _outputs.inverse_cholesky(covariance, dtype)
    _run("inverse_cholesky", covariance, covariance, *sizes, workspace, packed, dtype, info)
    return packed, info


def mahalanobis(
    x: Tensor,
    mean: Tensor,
    factor: Tensor,
    grid: list[int],
    window: int,
    prefix: int | None = None,
) -> Tensor:
    x, mean, factor = dense(x), mean.contiguous(), aligned(factor)
    distance = _outputs.mahalanobis(x, mean, factor, grid, window, prefix)
    _run(
        "mahalanobis", x, x, len(x), *grid, x.shape[3], mean, factor, factor.dtype, window,
        prefix or 0, distance,
    )  # fmt: skip
    return distance


def centroid_index(centroids: Tensor) -> Tensor:
    centroids = centroids.contiguous()
    index = _workspace(centroids, cuda.centroid_index_bytes(*centroids.shape))
    _run("centroid_index", centroids, centroids, *centroids.shape, index)
    return index


def nearest_centroid(
    x: Tensor, centroids: Tensor, index: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    x, centroids = x.contiguous(), centroids.contiguous()
    # A program that was exported on a CPU brings that CPU's.
    if index is None or index.dtype != torch.uint8:
        index = torch.ops.npad.centroid_index(centroids)  # by the kernel, where that may run
    workspace = _workspace(x, cuda.nearest_centroid_workspace(len(x), *centroids.shape))
    outputs = _outputs.nearest_centroid(x, centroids)
    _run(
        "nearest_centroid", x, x, len(x), centroids, *centroids.shape, aligned(index), workspace,
        *outputs,
    )  # fmt: skip
    return outputs


def farthest_first(points: Tensor, n_centroids: int, first: int) -> tuple[Tensor, Tensor]:
    points = points.contiguous()
    mean = axes = None  # every point is measured
    n_axes = cuda.farthest_first_axes(points.shape[1])
    size = cuda.farthest_first_workspace(len(points), n_axes)
    free = devices.free_bytes(points.device)
    fits = free is None or size < AXES_SHARE * free
    found = leading_axes(points, n_axes - 1) if n_axes and fits else None
    if found is not None:
        mean, axes = found[0], as_rows(found[1], n_axes, like=points, first=1)
    else:
        size = cuda.farthest_first_workspace(len(points), 0)
    outputs = _outputs.farthest_first(points, n_centroids, first)
    _run(
        "farthest_first", points, points, *points.shape, n_centroids, first, mean, axes,
        _workspace(points, size), *outputs,
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
    workspace = _workspace(x, cuda.anomaly_map_workspace(*x.shape))
    outputs = _outputs.anomaly_map(m, e, product, coefficients, size, sigma)
    _run(
        "anomaly_map", x, m, e, product, *coefficients, *x.shape, *bands(x, size, sigma), *size,
        workspace, *outputs,
    )  # fmt: skip
    return outputs


def resize_maps(maps: Tensor, heights: list[int], widths: list[int]) -> Tensor:
    maps = maps.contiguous()
    resized = _outputs.resize_maps(maps, heights, widths)
    _run("resize_maps", maps, maps, *maps.shape, integers(heights), integers(widths), resized)
    return resized


def _trusted(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel, and the op's reference on a GPU on which that kernel must not run."""
    op = kernel.__name__
    definition = getattr(reference, op)

    @wraps(kernel)
    def run(*arguments: Any) -> Any:
        chosen = definition if op in trust.failed(_index(arguments)) else kernel
        return chosen(*arguments)

    return run


def _index(arguments: tuple[Any, ...]) -> int:
    """Of the GPU on which all tensors are."""
    first = arguments[0] if arguments[0] is not None else arguments[1]  # one map may be left out
    x = first if isinstance(first, Tensor) else first[0]  # levels are a list
    return cast(int, x.device.index)


def run_on(device: torch.device) -> bool:
    """Whether every op runs by its kernel on a GPU; where one does not, the reference waits for it."""
    return registered and not trust.failed(device.index)


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
    kernels: tuple[Callable[..., Any], ...] = (
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
    _schemas.register("CUDA", *map(_trusted, kernels))
    return True


registered = register()  # otherwise the reference runs on the GPU
