"""The PyTorch definition of every op, written to be read.

These functions say what npad computes; the kernels in ``csrc/`` compute the same faster. They run on
any device and in any floating dtype, which is how the tests use them in float64 as the oracle.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import add, mul

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from npad.ops.packed import pack, restore, store, unpack

TRUNCATE = 4.0  # standard deviations at which the smoothing kernel ends


def window_positions(position: int, grid: tuple[int, int], window: int) -> Tensor:
    """Positions in the square window around one position, clipped at the border, in row order."""
    height, width = grid
    y, x, radius = position // width, position % width, window // 2
    rows = torch.arange(max(y - radius, 0), min(y + radius + 1, height), device="cpu")
    columns = torch.arange(max(x - radius, 0), min(x + radius + 1, width), device="cpu")
    return (rows[:, None] * width + columns).flatten()


def embed(levels: Sequence[Tensor], grid: tuple[int, int]) -> Tensor:
    """Levels of features, averaged over 3 x 3 patches, on one grid, concatenated, channels last."""
    grid = (grid[0], grid[1])
    aligned = []
    for level in levels:
        x = level.to(torch.promote_types(level.dtype, torch.float32))
        x = F.avg_pool2d(x, 3, stride=1, padding=1)  # zeros around the border counted
        if x.shape[2:] != grid:
            x = F.interpolate(x, size=grid, mode="bilinear", align_corners=False)
        aligned.append(x)
    return torch.cat(aligned, dim=1).permute(0, 2, 3, 1).contiguous()


def neighborhood_moments(x: Tensor, count: Tensor, mean: Tensor, scatter: Tensor) -> None:
    """Update of count, mean and scatter with a batch by Chan's formula, in place."""
    batch = x.shape[0]
    if batch == 0:
        return
    x = x.flatten(1, 2).to(mean.dtype)  # (B, P, C)
    batch_mean = x.mean(0)
    deviation = x - batch_mean
    delta = batch_mean - mean
    total = count + batch
    weight = count * batch / total.to(mean.dtype)
    update = torch.einsum("bpi,bpj->pij", deviation, deviation)
    update += weight[:, None, None] * delta[:, :, None] * delta[:, None, :]
    scatter += pack(update)
    mean += (batch / total.to(mean.dtype))[:, None] * delta
    count += batch


def window_covariance(
    count: Tensor,
    mean: Tensor,
    scatter: Tensor,
    grid: tuple[int, int],
    window: int,
    start: int,
    stop: int,
) -> tuple[Tensor, Tensor]:
    """Mean and covariance over the clipped window by the law of total covariance."""
    channels = mean.shape[1]
    means = mean.new_empty(stop - start, channels)
    covariances = mean.new_empty(stop - start, channels, channels)
    for p in range(start, stop):
        q = window_positions(p, grid, window).to(mean.device)
        n_q = count[q].to(mean.dtype)
        n = n_q.sum()
        mu = (n_q[:, None] * mean[q]).sum(0) / n
        deviation = mean[q] - mu
        lower = unpack(scatter[q].sum(0), channels)
        within = lower + lower.tril(-1).T
        between = torch.einsum("q,qi,qj->ij", n_q, deviation, deviation)
        means[p - start] = mu
        covariances[p - start] = (within + between) / (n - 1)
    return means, covariances


def pack_factor(factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Dense lower-triangular factors in the packed layout, rounded to ``dtype``."""
    return store(pack(factor), factor.shape[-1], dtype)


def inverse_cholesky(covariance: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """W = L^-1 of covariance = L L^T, packed and rounded to ``dtype``; and where that failed."""
    lower, info = torch.linalg.cholesky_ex(covariance)
    identity = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
    inverse = torch.linalg.solve_triangular(lower, identity.expand_as(lower), upper=False)
    packed = pack(inverse)
    packed[info != 0] = torch.nan
    return store(packed, lower.shape[-1], dtype), info


def mahalanobis(
    x: Tensor,
    mean: Tensor,
    factor: Tensor,
    grid: tuple[int, int],
    window: int = 1,
    prefix: int | None = None,
) -> Tensor:
    """Distance of each embedding to the nearest Gaussian of its window; in its prefix as well."""
    ends = [mean.shape[1]] if prefix is None else [prefix, mean.shape[1]]
    height, width = grid
    channels = mean.shape[1]
    z = x.reshape(len(x), height * width, channels).to(mean.dtype)
    distance = z.new_full((len(ends), len(x), height * width), torch.inf)
    for q in range(height * width):
        w = unpack(restore(factor[q : q + 1], channels, mean.dtype)[0], channels)
        near = window_positions(q, grid, window).to(x.device)  # who has q in their window
        for i, end in enumerate(ends):
            white = (z[:, near, :end] - mean[q, :end]) @ w[:end, :end].T
            d = torch.linalg.vector_norm(white, dim=-1)
            distance[i, :, near] = torch.minimum(distance[i, :, near], d)
    found = distance.reshape(len(ends), len(x), height, width)
    return found[0] if prefix is None else found


def centroid_index_dtype(device: torch.device) -> torch.dtype:
    """That of an index made on a device, and of no index made for other kernels."""
    return torch.uint8 if device.type == "cuda" else torch.int32


def centroid_index_size(k: int, channels: int, dtype: torch.dtype) -> int:
    """Elements of the index of k centroids.

    ``csrc/cpu/sketch.h`` says what they are in int32, ``csrc/cuda/rounded_rows.cuh`` in uint8.
    """
    if dtype == torch.uint8:
        groups, slices = -(-k // 128), -(-channels // 32)
        return groups * (8192 * slices + 1028) + 4 * channels
    axes = min(-(-channels // 4) * 4, 128)
    return 16 + -(-k // 16) * (48 + 4 * axes) + (1 + axes) * channels


def centroid_index(centroids: Tensor) -> Tensor:
    """Zeros, with which every kernel finds the same as without: this file searches without one."""
    (k, channels), dtype = centroids.shape, centroid_index_dtype(centroids.device)
    return centroids.new_zeros(centroid_index_size(k, channels, dtype), dtype=dtype)


def nearest_centroid(
    x: Tensor, centroids: Tensor, index: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Distance to, and index of, the nearest centroid; the first of equals."""
    if len(x) == 0:
        return x.new_empty(0), torch.empty(0, dtype=torch.int64, device=x.device)
    distances, nearest = [], []
    for rows in x.split(max(1, 2**22 // centroids.numel())):
        squared = (rows[:, None] - centroids).square().sum(-1)
        least, which = squared.min(1)
        distances.append(least.sqrt())
        nearest.append(which)
    return torch.cat(distances), torch.cat(nearest)


def farthest_first(points: Tensor, n_centroids: int, first: int = 0) -> tuple[Tensor, Tensor]:
    """Greedy k-center (Gonzalez 1985): each next centre is the point farthest from all before it.

    Of equally far points the first is taken. A point is never chosen twice: where all points left
    coincide with centres, the first of them is next.
    """
    index = torch.empty(n_centroids, dtype=torch.int64, device=points.device)
    radius = points.new_empty(n_centroids)
    squared = points.new_full((len(points),), torch.inf)
    chosen = torch.zeros(len(points), dtype=torch.bool, device=points.device)
    farthest = torch.tensor(first, device=points.device)
    for k in range(n_centroids):
        index[k] = farthest
        chosen[farthest] = True
        squared = torch.minimum(squared, (points - points[farthest]).square().sum(-1))
        radius[k] = squared.max().sqrt()
        farthest = squared.masked_fill(chosen, -1.0).argmax()
    return index, radius


def anomaly_map(
    mahalanobis: Tensor | None,
    euclidean: Tensor | None,
    product: bool,
    coefficients: list[float],
    size: list[int],
    sigma: float,
) -> tuple[Tensor, Tensor]:
    """Both maps fused, upsampled bilinearly and smoothed, and the maximum of each."""
    a, b, c = coefficients
    given = [(x, k) for x, k in ((mahalanobis, a), (euclidean, b)) if x is not None]
    terms = [x**k if product else k * x for x, k in given]
    fused = reduce(mul if product else add, terms) + c
    low, high = (f(fused, (1, 2), keepdim=True) for f in (torch.amin, torch.amax))
    # What is left of a constant map is exactly zero. One value that is not finite makes all NaN.
    base = low + 0 * (high - low)
    above = F.interpolate((fused - base)[:, None], size=size, mode="bilinear", align_corners=False)[
        :, 0
    ]
    rows, columns = (gaussian_matrix(n, sigma).to(above) for n in size)
    maps = rows @ above @ columns.T + base
    return maps, maps.amax((1, 2))


def gaussian_matrix(size: int, sigma: float) -> Tensor:
    """Smoothing of ``size`` samples mirrored at both ends: (size, size), every row sums to 1."""
    if sigma == 0:
        return torch.eye(size, dtype=torch.float64, device="cpu")
    radius = int(TRUNCATE * sigma + 0.5)
    offsets = torch.arange(-radius, radius + 1, device="cpu")
    taps = torch.exp(-0.5 * (offsets.double() / sigma) ** 2)
    period = 2 * size  # of the mirrored samples
    taps = torch.bincount(offsets % period, taps / taps.sum(), minlength=period)
    outputs, inputs = (torch.arange(n, device="cpu") for n in (size, period))
    circular = taps[(inputs - outputs[:, None]) % period]
    return circular[:, :size] + circular[:, size:].flip(1)


def axis_band(n: int, size: int, sigma: float) -> tuple[Tensor, Tensor]:
    """One axis of ``anomaly_map``, n samples to ``size``, as the matrix of few taps that it is.

    first (size,) int32 and taps (size, k) float32: output i is sum_j taps[i, j] x[first[i] + j].
    """
    identity = torch.eye(n, dtype=torch.float64, device="cpu")[None]
    upsample = F.interpolate(identity, size=size, mode="linear", align_corners=False)[0].T
    matrix = (gaussian_matrix(size, sigma) @ upsample).float()
    used = (matrix != 0).int()
    first, last = used.argmax(1), n - 1 - used.flip(1).argmax(1)
    width = int((last - first).max()) + 1
    first = first.clamp(max=n - width)
    return first.int(), matrix.gather(1, first[:, None] + torch.arange(width, device="cpu"))


def resize_maps(maps: Tensor, heights: list[int], widths: list[int]) -> Tensor:
    """Each map at its own size, bilinearly, all in one flat tensor, one after another."""
    resized = [
        F.interpolate(map_[None, None], size=size, mode="bilinear", align_corners=False).flatten()
        for map_, *size in zip(maps, heights, widths, strict=True)
    ]
    return torch.cat(resized) if resized else maps.new_empty(0)
