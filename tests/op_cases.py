"""Every op with its reference and arguments, for tests of what holds for all of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from fitted import gaussians
from torch import Tensor

from npad import ops
from npad.ops import reference

GRID = (4, 3)
Arguments = tuple[object, ...]


def statistics(channels: int) -> tuple[Tensor, Tensor, Tensor]:
    state = (
        torch.zeros(12, dtype=torch.int64),
        torch.zeros(12, channels),
        torch.zeros(12, ops.packed_size(channels)),
    )
    reference.neighborhood_moments(torch.randn(9, *GRID, channels), *state)
    return state


def moments(x: Tensor, *state: Tensor) -> tuple[Tensor, Tensor]:
    count, mean, scatter = (s.clone() for s in state)
    ops.neighborhood_moments(x, count, mean, scatter)
    return mean, scatter


def reference_moments(x: Tensor, *state: Tensor) -> tuple[Tensor, Tensor]:
    count, mean, scatter = (s.clone() for s in state)
    reference.neighborhood_moments(x, count, mean, scatter)
    return mean, scatter


def spread(channels: int) -> Tensor:
    x = torch.randn(5, channels + 9, channels)
    return x.mT @ x / (channels + 9) + 0.1 * torch.eye(channels)


def scoring(channels: int) -> Arguments:
    mean, factor = gaussians(GRID, channels)
    return torch.randn(3, *GRID, channels), mean, reference.pack(factor), GRID, 3


def levels(channels: int) -> Arguments:
    """One of the grid's size, one smaller, one larger; channels side by side, apart, and neither."""
    same = torch.randn(3, channels, 5, 6).to(memory_format=torch.channels_last)
    return same, torch.randn(3, 4, 3, 2), torch.randn(3, 5, 9, 14)[:, ::2, :, ::2], (5, 6)


# name: op, reference, arguments for a number of channels
OPS: dict[str, tuple[Callable[..., object], Callable[..., object], Callable[[int], Arguments]]] = {
    "embed": (
        lambda a, b, c, grid: ops.embed([a, b, c], grid),
        lambda a, b, c, grid: reference.embed([a, b, c], grid),
        levels,
    ),
    "neighborhood_moments": (
        moments,
        reference_moments,
        lambda c: (torch.randn(5, *GRID, c) + 1, *statistics(c)),
    ),
    "window_covariance": (
        ops.window_covariance,
        reference.window_covariance,
        lambda c: (*statistics(c), GRID, 3, 1, 12),
    ),
    "pack_factor": (
        ops.pack_factor,
        reference.pack_factor,
        lambda c: (torch.randn(3, c, c), torch.float32),
    ),
    "inverse_cholesky": (
        ops.inverse_cholesky,
        reference.inverse_cholesky,
        lambda c: (spread(c), torch.float32),
    ),
    "mahalanobis": (ops.mahalanobis, reference.mahalanobis, scoring),
    "nearest_centroid": (
        ops.nearest_centroid,
        reference.nearest_centroid,
        lambda c: (torch.randn(203, c), torch.randn(77, c)),
    ),
    "farthest_first": (
        ops.farthest_first,
        reference.farthest_first,
        lambda c: ((4 * torch.randn(301, 3 * c)).round(), 40, 7),
    ),
    "anomaly_map": (
        ops.anomaly_map,
        reference.anomaly_map,
        lambda c: (
            *(0.1 + torch.rand(3, 5, c) for _ in "ME"),
            True,
            (0.4, 0.6, 0.5),
            (41, 3 * c),
            2.0,
        ),
    ),
    "resize_maps": (
        ops.resize_maps,
        lambda maps, sizes: reference.resize_maps(maps, *map(list, zip(*sizes, strict=True))),
        lambda c: (torch.rand(3, 9, c), [(9, 4 * c), (30, c // 3 + 1), (1, c)]),
    ),
}


def on(device: str, arguments: Arguments, dtype: torch.dtype | None = None) -> Arguments:
    def move(a: object) -> object:
        if not isinstance(a, Tensor):
            return torch.float64 if dtype is not None and a is torch.float32 else a
        a = a.to(device)
        return a.to(dtype) if dtype is not None and a.is_floating_point() else a

    return tuple(map(move, arguments))


def tensors(result: object) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)  # type: ignore[call-overload]


# name and position of each tensor after the first, for ops that take several
SEVERAL = [
    (name, position)
    for name, (_, _, make) in OPS.items()
    for position, a in enumerate(make(2))
    if position > 0 and isinstance(a, Tensor)
]


def moved(arguments: Arguments, position: int, device: str) -> Arguments:
    """The arguments with one tensor on another device."""
    return tuple(
        a.to(device) if i == position and isinstance(a, Tensor) else a
        for i, a in enumerate(arguments)
    )


def strided(arguments: Arguments) -> Arguments:
    """The same values in views of which no two elements are neighbours in memory."""
    return tuple(torch.stack([a, a], -1)[..., 0] if isinstance(a, Tensor) else a for a in arguments)


def room_of(x: Tensor) -> Tensor:
    """What a view may be read from: its first to its last element, as one dense tensor."""
    last = sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
    return x.as_strided((last + 1,), (1,))


def off_by_one(arguments: Arguments) -> Arguments:
    """The same values with the same strides, one element past where memory was allocated."""

    def move(a: object) -> object:
        if not isinstance(a, Tensor):
            return a
        return a.new_empty(1 + room_of(a).numel()).as_strided(a.shape, a.stride(), 1).copy_(a)

    return tuple(map(move, arguments))


# name: arguments that ask for nothing, and the shapes of the results
EMPTY: dict[str, tuple[Arguments, list[tuple[int, ...]]]] = {
    "embed": ((*(x[:0] for x in levels(9)[:3]), (5, 6)), [(0, 5, 6, 16)]),
    "neighborhood_moments": (
        (torch.empty(0, *GRID, 9), *statistics(9)),
        [(12, 9), (12, ops.packed_size(9))],
    ),
    "window_covariance": ((*statistics(9), GRID, 3, 5, 5), [(0, 9), (0, 9, 9)]),
    "pack_factor": ((torch.empty(0, 9, 9), torch.float16), [(0, ops.packed_size(9))]),
    "inverse_cholesky": ((torch.empty(0, 9, 9), torch.float16), [(0, ops.packed_size(9)), (0,)]),
    "mahalanobis": ((torch.empty(0, *GRID, 8), *scoring(8)[1:]), [(0, *GRID)]),
    "nearest_centroid": ((torch.empty(0, 9), torch.randn(3, 9)), [(0,), (0,)]),
    "anomaly_map": (
        (torch.empty(0, 4, 3), None, False, (1.0, 0.0, 0.0), (8, 6), 1.0),
        [(0, 8, 6), (0,)],
    ),
    "resize_maps": ((torch.empty(0, 4, 3), []), [(0,)]),
}
