"""The CUDA kernels of neighborhood_moments, on the CPU."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_accurate
from fitted import Moments, reference_moments, zeros
from simt_device import LaunchError, Simt, load
from torch import Tensor

from npad.ops import reference
from npad.ops.packed import packed_layout


@pytest.fixture(params=["simt_fast", "simt_fma", "simt_sm75", "simt_checked"])
def simt(request: pytest.FixtureRequest) -> Simt:
    return load(request.param)


@pytest.fixture
def fast() -> Simt:
    return load("simt_fast")


def update(simt: Simt, x: Tensor, state: Moments) -> None:
    """One launch; ``x`` is (N, H, W, C)."""
    batch, channels = x.shape[0], x.shape[3]
    simt("neighborhood_moments", x.contiguous(), batch, len(state[0]), channels, *state)


def check(simt: Simt, x: Tensor, first: int) -> None:
    """Two batches, of which the second meets counts, means and scatters that are not zero."""
    state = zeros(x.shape[1] * x.shape[2], x.shape[3])
    update(simt, x[:first], state)
    update(simt, x[first:], state)
    single, oracle = zeros(len(state[0]), x.shape[3]), reference_moments(x)
    for batch in (x[:first], x[first:]):
        reference.neighborhood_moments(batch, *single)
    assert torch.equal(state[0], oracle[0])
    assert_accurate(state[1], single[1], oracle[1])
    assert_accurate(state[2], single[2], oracle[2])
    row, column = packed_layout(x.shape[3])
    assert (state[2][:, (column > row) | (row < 0)] == 0).all()


@pytest.mark.parametrize("channels", [1, 7, 8, 17, 31, 33, 64, 65, 100, 129])
def test_against_reference(simt: Simt, channels: int) -> None:
    check(simt, torch.randn(14, 1, 2, channels) * 2 + 1, 3)


@pytest.mark.parametrize("channels", [8, 31])
def test_grid(simt: Simt, channels: int) -> None:
    check(simt, torch.randn(9, 3, 4, channels) * 2 + 1, 8)


@pytest.mark.parametrize("batch", [1, 2, 7, 8, 31, 32, 33, 64, 97])
def test_batches_in_pieces(fast: Simt, batch: int) -> None:
    check(fast, torch.randn(batch + 40, 1, 1, 73) - 3, 40)


def test_batches_in_pieces_are_checked() -> None:
    check(load("simt_checked"), torch.randn(37, 1, 1, 73) - 3, 4)


def test_many_tiles(fast: Simt) -> None:
    check(fast, torch.randn(12, 1, 1, 330) + 1, 9)


def test_counts_differ(fast: Simt) -> None:
    x = torch.randn(6, 1, 3, 20)
    state = reference_moments(x[:3], torch.float32)
    single, oracle = (
        [t.clone() for t in state],
        [state[0].clone(), *(t.double() for t in state[1:])],
    )
    for counts in (state[0], single[0], oracle[0]):
        counts.copy_(torch.tensor([3, 0, 2**31]))
    update(fast, x[3:], state)
    reference.neighborhood_moments(x[3:], *single)
    reference.neighborhood_moments(x[3:], *oracle)
    assert torch.equal(state[0], oracle[0])
    for a, s, o in zip(state[1:], single[1:], oracle[1:], strict=True):
        assert_accurate(a, s, o)


def test_offset_does_not_cancel(fast: Simt) -> None:
    """A scatter of 1 about a mean of 1e4 keeps its digits: nothing is a difference of squares."""
    x = torch.randn(64, 1, 2, 16) + 1e4
    state = zeros(2, 16)
    for batch in x.split(16):
        update(fast, batch, state)
    oracle = reference_moments(x)[2]
    assert (state[2] - oracle).abs().max() < 2e-3 * oracle.abs().max()


@pytest.mark.parametrize("fault", [torch.nan, torch.inf])
def test_nan_stays_where_it_is(simt: Simt, fault: float) -> None:
    x = torch.randn(11, 1, 2, 70)
    x[1, 0, 1, 2] = fault
    state, oracle = zeros(2, 70), reference_moments(x)
    update(simt, x, state)
    assert torch.equal(state[2].isnan(), oracle[2].isnan())
    assert torch.equal(state[1].isfinite(), oracle[1].isfinite())


def test_nothing_to_do(simt: Simt) -> None:
    state = reference_moments(torch.randn(2, 1, 2, 5), torch.float32)
    before = [t.clone() for t in state]
    update(simt, torch.empty(0, 1, 2, 5), state)
    assert all(torch.equal(a, b) for a, b in zip(state, before, strict=True))
    update(simt, torch.empty(3, 0, 2, 5), zeros(0, 5))


def test_more_blocks_than_a_grid_has(fast: Simt) -> None:
    with pytest.raises(LaunchError, match="cudaError 9"):
        fast("neighborhood_moments", torch.zeros(1), 1, 2**30, 65, *zeros(1, 1))
