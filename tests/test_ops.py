"""What every op does alike: refuses what does not belong together, takes any view, and nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from op_cases import EMPTY, OPS, SEVERAL, moved, off_by_one, strided
from torch import Tensor
from torch._subclasses import FakeTensorMode

from npad import ops
from npad.check.cases import GRID, tensors

LIMIT = ops.MAX_CHANNELS
MIXED = r"is on (\S+) but \S+ is on (?!\1)\S+; move one"


@pytest.mark.parametrize(("name", "position"), SEVERAL)
def test_mixed_devices(name: str, position: int) -> None:
    op, _, make = OPS[name]
    with pytest.raises(ValueError, match=MIXED):
        op(*moved(make(8), position, "meta"))


@pytest.mark.parametrize(("name", "position"), SEVERAL)
def test_two_gpus(name: str, position: int) -> None:
    """Tensors that only say that they are on a GPU stand for those that are."""
    op, _, make = OPS[name]
    arguments = make(8)
    with FakeTensorMode() as mode:
        fakes = (mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments)
        here = tuple(a.to("cuda:0") if isinstance(a, Tensor) else a for a in fakes)
        with pytest.raises(ValueError, match=MIXED):
            op(*moved(here, position, "cuda:1"))


@pytest.mark.parametrize("name", OPS)
def test_strided_views(name: str) -> None:
    op, _, make = OPS[name]
    arguments = make(31)
    views = strided(arguments)
    assert not any(a.is_contiguous() for a in views if isinstance(a, Tensor))
    expected = tensors(op(*arguments))
    for a, b in zip(tensors(op(*views)), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", OPS)
def test_odd_addresses(name: str) -> None:
    op, _, make = OPS[name]
    arguments = make(32)
    moved_by_one = off_by_one(arguments)
    assert not any(a.data_ptr() % 16 == 0 for a in moved_by_one if isinstance(a, Tensor))
    expected = tensors(op(*arguments))
    for a, b in zip(tensors(op(*moved_by_one)), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("position", [1, 2, 3])
def test_what_is_updated_in_place_is_contiguous(position: int) -> None:
    _, _, make = OPS["neighborhood_moments"]
    arguments = list(make(8))
    arguments[position] = strided((arguments[position],))[0]
    with pytest.raises(ValueError, match="is updated in place and must be contiguous"):
        ops.neighborhood_moments(*arguments)  # type: ignore[arg-type]


def test_a_scatter_at_an_odd_address_is_not_updated_in_place() -> None:
    _, _, make = OPS["neighborhood_moments"]
    x, count, mean, scatter = off_by_one(make(8))
    said = r"scatter .* must start at a multiple of 16 bytes, got 4 bytes past one; give it"
    with pytest.raises(ValueError, match=said):
        ops.neighborhood_moments(x, count, mean, scatter)  # type: ignore[arg-type]
    ops.neighborhood_moments(x, count, mean, scatter.clone())  # type: ignore[arg-type, attr-defined]


@pytest.mark.parametrize("name", EMPTY)
def test_nothing_to_do(name: str) -> None:
    op, _, _ = OPS[name]
    arguments, shapes = EMPTY[name]
    assert [tuple(a.shape) for a in tensors(op(*arguments))] == shapes


def test_farthest_first_of_nothing() -> None:
    with pytest.raises(ValueError, match=r"points must have shape \(N, D\) with N, D >= 1"):
        ops.farthest_first(torch.empty(0, 3), 1)


def of(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Zeros that take no memory."""
    return torch.zeros((), dtype=dtype).expand(shape)


def count(n: int) -> Tensor:
    return of(n, dtype=torch.int64)


BY_CHANNELS: dict[str, Callable[[int], object]] = {
    "neighborhood_moments": lambda c: ops.neighborhood_moments(
        of(1, *GRID, c), count(12), of(12, c), of(12, 8)
    ),
    "window_covariance": lambda c: ops.window_covariance(
        count(12), of(12, c), of(12, 8), GRID, 1, 0, 1
    ),
    "pack_factor": lambda c: ops.pack_factor(of(1, c, c)),
    "inverse_cholesky": lambda c: ops.inverse_cholesky(of(1, c, c)),
    "mahalanobis": lambda c: ops.mahalanobis(of(1, *GRID, c), of(12, c), of(12, 8), GRID),
}


@pytest.mark.parametrize("channels", [0, LIMIT + 1])
@pytest.mark.parametrize("name", BY_CHANNELS)
def test_number_of_channels(name: str, channels: int) -> None:
    said = f"npad.{name}: the number of channels must be 1 to {LIMIT}, got {channels}; reduce it"
    with pytest.raises(ValueError, match=said):
        BY_CHANNELS[name](channels)


def test_nearest_centroid_has_no_limit_of_channels() -> None:
    x = torch.randn(3, 2 * LIMIT + 1)
    distance, index = ops.nearest_centroid(x, torch.cat([x + 1, x]))
    assert index.tolist() == [3, 4, 5]
    assert (distance == 0).all()
