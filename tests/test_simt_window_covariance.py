"""The CUDA kernel of window_covariance, on the CPU."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_accurate
from fitted import Moments, reference_moments
from simt_device import LaunchError, Simt, load
from torch import Tensor

from npad.ops import reference


@pytest.fixture(params=["simt_fast", "simt_fma", "simt_checked"])
def simt(request: pytest.FixtureRequest) -> Simt:
    return load(request.param)


@pytest.fixture
def fast() -> Simt:
    return load("simt_fast")


def fitted(x: Tensor) -> Moments:
    """Float32 moments of (N, H, W, C)."""
    count, mean, scatter = reference_moments(x)
    return count, mean.float(), scatter.float()


def run(
    simt: Simt, state: Moments, grid: tuple[int, int], window: int, start: int, stop: int
) -> tuple[Tensor, Tensor]:
    channels = state[1].shape[1]
    mean = torch.full((stop - start, channels), 7.0)
    covariance = torch.full((stop - start, channels, channels), 7.0)
    sizes = (*grid, channels, window, start, stop)
    simt("window_covariance", *state, *sizes, mean, covariance)
    return mean, covariance


def check(simt: Simt, state: Moments, grid: tuple[int, int], window: int) -> None:
    stop = grid[0] * grid[1]
    actual = run(simt, state, grid, window, 0, stop)
    single = reference.window_covariance(*state, grid, window, 0, stop)
    exact = (state[0], state[1].double(), state[2].double())
    oracle = reference.window_covariance(*exact, grid, window, 0, stop)
    for a, s, o in zip(actual, single, oracle, strict=True):
        assert_accurate(a, s, o)
    assert torch.equal(actual[1].nan_to_num(), actual[1].mT.nan_to_num())


@pytest.mark.parametrize("channels", [1, 7, 8, 17, 31, 33, 65, 100, 129])
def test_against_reference(simt: Simt, channels: int) -> None:
    check(simt, fitted(torch.randn(6, 1, 2, channels) * 2 + 1), (1, 2), 3)


@pytest.mark.parametrize("window", [1, 3, 5, 31])
@pytest.mark.parametrize("grid", [(1, 1), (3, 4), (5, 6)])
def test_windows(fast: Simt, grid: tuple[int, int], window: int) -> None:
    check(fast, fitted(torch.randn(4, *grid, 11) + torch.randn(*grid, 1)), grid, window)


def test_windows_are_checked() -> None:
    check(load("simt_checked"), fitted(torch.randn(4, 3, 5, 9)), (3, 5), 5)


def test_range(simt: Simt) -> None:
    grid = (5, 6)
    state = fitted(torch.randn(5, *grid, 10))
    mean, covariance = run(simt, state, grid, 3, 0, 30)
    for start, stop in [(0, 1), (9, 10), (7, 22), (12, 18), (29, 30)]:
        part = run(simt, state, grid, 3, start, stop)
        assert torch.equal(part[0], mean[start:stop])
        assert torch.equal(part[1], covariance[start:stop])
    run(simt, state, grid, 3, 4, 4)


@pytest.mark.parametrize("counts", [(5, 0, 2, 9), (1, 0, 0, 0), (0, 0, 0, 0), (0, 1, 1, 0)])
def test_counts_weigh(simt: Simt, counts: tuple[int, ...]) -> None:
    """Positions seen unequally often; windows that hold no sample, or one."""
    parts = [torch.randn(n, 1, 1, 12) + n for n in counts]
    states = [reference_moments(part) for part in parts]
    count, mean, scatter = (torch.cat([s[i] for s in states]) for i in range(3))
    check(simt, (count, mean.float(), scatter.float()), (1, 4), 3)


def test_offset_does_not_cancel(fast: Simt) -> None:
    grid = (3, 3)
    state = fitted(torch.randn(8, *grid, 16) + 1e4)
    oracle = reference.window_covariance(
        state[0], state[1].double(), state[2].double(), grid, 3, 0, 9
    )
    actual = run(fast, state, grid, 3, 0, 9)
    assert (actual[0] - oracle[0]).abs().max() <= 1e4 * 2.0**-23
    assert (actual[1] - oracle[1]).abs().max() < 1e-5 * oracle[1].abs().max()


def test_nan_stays_in_its_windows(simt: Simt) -> None:
    grid = (3, 7)
    state = fitted(torch.randn(4, *grid, 9))
    state[1][8, 3] = torch.nan
    state[2][12, 20] = torch.nan
    check(simt, state, grid, 3)


def test_more_positions_than_a_grid_has(fast: Simt) -> None:
    with pytest.raises(LaunchError, match="cudaError 9"):
        run(fast, fitted(torch.randn(2, 1, 1, 1)), (2**20, 2**12), 3, 0, 1)
