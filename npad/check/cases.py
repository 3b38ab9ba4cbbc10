"""Every op with its reference and arguments that reach all of its kernels' paths.

A row of `CASES` has the op tested, by the suite and on a user's machine by `npad check`, for what holds
for all ops. Arguments are made on the CPU, from torch's random numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from npad import ops
from npad.ops import reference

__all__ = ["CASES", "GRID", "Arguments", "Case", "gaussians", "on", "statistics", "tensors"]

GRID = (4, 3)
Grid = tuple[int, int]
Arguments = tuple[object, ...]


class Case(NamedTuple):
    """What is known about an op.

    Attributes
    ----------
    op, reference : of the same arguments, which both leave as they are
    make : arguments for a number of channels, or of columns
    variants : other arguments for it, by what is other about them
    large : arguments of which a GPU is full, of about the size that a model has
    timed : the op alone, where ``op`` does more; it may write into its arguments
    """

    op: Callable[..., object]
    reference: Callable[..., object]
    make: Callable[[int], Arguments]
    variants: Mapping[str, Callable[[int], Arguments]]
    large: Callable[[], Arguments]
    timed: Callable[..., object] | None = None


# --- arguments ---


def gaussians(grid: Grid, channels: int) -> tuple[Tensor, Tensor]:
    """Random means and well-conditioned dense lower factors: (P, C), (P, C, C)."""
    positions = grid[0] * grid[1]
    mean = torch.randn(positions, channels)
    factor = torch.randn(positions, channels, channels).tril(-1) / channels**0.5
    return mean, factor + torch.eye(channels) * (0.5 + torch.rand(positions, channels, 1))


def statistics(channels: int, grid: Grid = GRID) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and scatter of nine random embeddings at each position."""
    positions = grid[0] * grid[1]
    state = (
        torch.zeros(positions, dtype=torch.int64),
        torch.zeros(positions, channels),
        torch.zeros(positions, ops.packed_size(channels)),
    )
    reference.neighborhood_moments(torch.randn(9, *grid, channels), *state)
    return state


def _levels(channels: int, dtype: torch.dtype = torch.float32) -> Arguments:
    """One of the grid's size, one smaller, one larger; channels side by side, apart, and neither."""
    same = torch.randn(3, channels, 5, 6).to(memory_format=torch.channels_last)
    levels = same, torch.randn(3, 4, 3, 2), torch.randn(3, 5, 9, 14)[:, ::2, :, ::2]
    return *(level.to(dtype) for level in levels), (5, 6)


def _large_levels() -> Arguments:
    shapes = (4, 64, 64, 64), (4, 128, 32, 32), (4, 256, 16, 16)
    return *(torch.randn(s).to(memory_format=torch.channels_last) for s in shapes), (64, 64)


def _batch(channels: int, grid: Grid = GRID, n: int = 5, dtype: str = "float32") -> Arguments:
    x = torch.randn(n, *grid, channels).add(1).to(getattr(torch, dtype))
    return x, *statistics(channels, grid)


def _windows(channels: int, grid: Grid = GRID, window: int = 3, start: int = 1) -> Arguments:
    return *statistics(channels, grid), grid, window, start, grid[0] * grid[1]


def _factors(channels: int, n: int = 3, dtype: torch.dtype = torch.float32) -> Arguments:
    return torch.randn(n, channels, channels), dtype


def _covariances(channels: int, n: int = 5, dtype: torch.dtype = torch.float32) -> Arguments:
    x = torch.randn(n, channels + 9, channels)
    return x.mT @ x / (channels + 9) + 0.1 * torch.eye(channels), dtype


def _scoring(
    channels: int,
    grid: Grid = GRID,
    n: int = 3,
    window: int = 3,
    dtype: torch.dtype = torch.float32,
    prefix: bool = False,
) -> Arguments:
    mean, factor = gaussians(grid, channels)
    packed = reference.pack_factor(factor, dtype)
    x = torch.randn(n, *grid, channels)
    return x, mean, packed, grid, window, max(channels // 2, 1) if prefix and channels > 1 else None


def _search(channels: int, n: int = 203, k: int = 77, indexed: bool = False) -> Arguments:
    x, centroids = torch.randn(n, channels), torch.randn(k, channels)
    return (x, centroids, ops.centroid_index(centroids)) if indexed else (x, centroids)


def _points(channels: int, n: int = 301, k: int = 40) -> Arguments:
    """Integers, whose distances float32 holds and of which many are equal."""
    return (4 * torch.randn(n, channels)).round(), k, 7


def _maps(
    columns: int, product: bool = True, both: bool = True, sigma: float = 2.0, n: int = 3
) -> Arguments:
    m, e = (0.1 + torch.rand(n, 5, columns) for _ in "ME")
    return m, e if both else None, product, (0.4, 0.6, 0.5), (41, 3 * columns), sigma


def _large_maps() -> Arguments:
    m, e = (0.1 + torch.rand(16, 32, 32) for _ in "ME")
    return m, e, True, (0.4, 0.6, 0.5), (512, 512), 4.0


# --- ops whose arguments the table cannot hold as they are ---


def _moments(update: Callable[..., None], x: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
    """Update copies."""
    copies = tuple(s.clone() for s in state)
    update(x, *copies)
    return copies


def _embed(embed: Callable[..., Tensor], *arguments: object) -> Tensor:
    return embed(list(arguments[:-1]), arguments[-1])


def _by_index(x: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Search: an index has no values of its own that could be compared."""
    return ops.nearest_centroid(x, centroids, ops.centroid_index(centroids))


def _resize_by_reference(maps: Tensor, sizes: list[tuple[int, int]]) -> Tensor:
    return reference.resize_maps(maps, [h for h, _ in sizes], [w for _, w in sizes])


HALF, BFLOAT = torch.float16, torch.bfloat16

CASES: dict[str, Case] = {
    "embed": Case(
        partial(_embed, ops.embed),
        partial(_embed, reference.embed),
        _levels,
        {"float16": partial(_levels, dtype=HALF), "bfloat16": partial(_levels, dtype=BFLOAT)},
        _large_levels,
    ),
    "neighborhood_moments": Case(
        partial(_moments, ops.neighborhood_moments),
        partial(_moments, reference.neighborhood_moments),
        _batch,
        {"float16": partial(_batch, dtype="float16"), "one image": partial(_batch, n=1)},
        partial(_batch, 100, (32, 32), n=16),
        timed=ops.neighborhood_moments,
    ),
    "window_covariance": Case(
        ops.window_covariance,
        reference.window_covariance,
        _windows,
        {"window 1": partial(_windows, window=1), "window 9": partial(_windows, window=9)},
        partial(_windows, 100, (20, 20), start=0),
    ),
    "pack_factor": Case(
        ops.pack_factor,
        reference.pack_factor,
        _factors,
        {"float16": partial(_factors, dtype=HALF), "bfloat16": partial(_factors, dtype=BFLOAT)},
        partial(_factors, 100, n=1024),
    ),
    "inverse_cholesky": Case(
        ops.inverse_cholesky,
        reference.inverse_cholesky,
        _covariances,
        {"float16": partial(_covariances, dtype=HALF)},
        partial(_covariances, 100, n=512),
    ),
    "mahalanobis": Case(
        ops.mahalanobis,
        reference.mahalanobis,
        _scoring,
        {
            "window 1": partial(_scoring, window=1),
            "window 5, one image": partial(_scoring, window=5, n=1),
            "float16 factor": partial(_scoring, dtype=HALF),
            "bfloat16 factor, window 1": partial(_scoring, dtype=BFLOAT, window=1),
            "int8 factor": partial(_scoring, dtype=torch.int8),
            "prefix": partial(_scoring, prefix=True),
            "17 images": partial(_scoring, n=17),
        },
        partial(_scoring, 100, (32, 32), n=4, window=1),
    ),
    "centroid_index": Case(
        _by_index,
        reference.nearest_centroid,
        _search,
        {"one centroid": partial(_search, k=1), "two groups": partial(_search, k=129)},
        partial(_search, 100, n=8, k=8192),
        timed=lambda x, centroids: ops.centroid_index(centroids),
    ),
    "nearest_centroid": Case(
        ops.nearest_centroid,
        reference.nearest_centroid,
        _search,
        {"index": partial(_search, indexed=True), "one centroid": partial(_search, k=1)},
        partial(_search, 100, n=1024, k=1024),
    ),
    "farthest_first": Case(
        ops.farthest_first,
        reference.farthest_first,
        lambda c: _points(3 * c),
        {"few dimensions": lambda c: _points(min(c, 5))},
        partial(_points, 100, n=20_000, k=64),
    ),
    "anomaly_map": Case(
        ops.anomaly_map,
        reference.anomaly_map,
        _maps,
        {
            "sum": partial(_maps, product=False),
            "one map": partial(_maps, both=False),
            "not smoothed": partial(_maps, sigma=0.0),
        },
        _large_maps,
    ),
    "resize_maps": Case(
        ops.resize_maps,
        _resize_by_reference,
        lambda c: (torch.rand(3, 9, c), [(9, 4 * c), (30, c // 3 + 1), (1, c)]),
        {"one map": lambda c: (torch.rand(1, c, 5), [(7, 2 * c)])},
        lambda: (torch.rand(16, 256, 256), [(600, 800)] * 16),
    ),
}


# --- what holds for the arguments and results of all ---


def on(
    device: str | torch.device, arguments: Arguments, dtype: torch.dtype | None = None
) -> Arguments:
    """The arguments on a device; with a dtype all that are floating take it, and so do results."""

    def move(a: object) -> object:
        if not isinstance(a, Tensor):
            return dtype if dtype is not None and isinstance(a, torch.dtype) else a
        a = a.to(device)
        return a.to(dtype) if dtype is not None and a.is_floating_point() else a

    return tuple(map(move, arguments))


def tensors(result: object) -> list[Tensor]:
    """The results of an op as a list."""
    return [result] if isinstance(result, Tensor) else list(result)  # type: ignore[call-overload]
