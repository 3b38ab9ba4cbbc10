"""Every op with its reference and arguments, for tests of what holds for all of them."""

from __future__ import annotations

import torch
from torch import Tensor

from npad import ops
from npad.check.cases import CASES, GRID, Arguments, statistics

OPS = {name: (case.op, case.reference, case.make) for name, case in CASES.items()}

# what an op's case launches on a GPU: a search makes an index, and an index is tried by a search
_SEARCH = ["centroid_index", "nearest_centroid"]
LAUNCHES = {name: [name] for name in OPS} | dict.fromkeys(_SEARCH, _SEARCH)

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
    "embed": (
        (torch.empty(0, 9, 5, 6), torch.empty(0, 4, 3, 2), torch.empty(0, 5, 3, 3), (5, 6)),
        [(0, 5, 6, 18)],
    ),
    "neighborhood_moments": (
        (torch.empty(0, *GRID, 9), *statistics(9)),
        [(12,), (12, 9), (12, ops.packed_size(9))],
    ),
    "window_covariance": ((*statistics(9), GRID, 3, 5, 5), [(0, 9), (0, 9, 9)]),
    "pack_factor": ((torch.empty(0, 9, 9), torch.float16), [(0, ops.packed_size(9))]),
    "inverse_cholesky": ((torch.empty(0, 9, 9), torch.float16), [(0, ops.packed_size(9)), (0,)]),
    "mahalanobis": (
        (torch.empty(0, *GRID, 8), torch.zeros(12, 8), torch.zeros(12, ops.packed_size(8)), GRID),
        [(0, *GRID)],
    ),
    "nearest_centroid": ((torch.empty(0, 9), torch.randn(3, 9)), [(0,), (0,)]),
    "anomaly_map": (
        (torch.empty(0, 4, 3), None, False, (1.0, 0.0, 0.0), (8, 6), 1.0),
        [(0, 8, 6), (0,)],
    ),
    "resize_maps": ((torch.empty(0, 4, 3), []), [(0,)]),
}
