"""window_covariance: the law of total covariance over clipped windows."""

import pytest
import torch
from accuracy import assert_accurate
from fitted import reference_moments
from torch import Tensor

from npad import ops
from npad.ops import reference


def single(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    count, mean, scatter = reference_moments(x)
    return count, mean.float(), scatter.float()


@pytest.mark.parametrize("window", [1, 3, 5, 31])
@pytest.mark.parametrize("channels", [1, 7, 8, 31, 129])
def test_against_reference(isa: str, channels: int, window: int) -> None:
    grid = (4, 3)
    state = single(torch.randn(6, *grid, channels) * 2 + 1)
    actual = ops.window_covariance(*state, grid, window, 0, 12)
    working = reference.window_covariance(*state, grid, window, 0, 12)
    oracle = reference.window_covariance(
        state[0], state[1].double(), state[2].double(), grid, window, 0, 12
    )
    for a, w, o in zip(actual, working, oracle, strict=True):
        assert_accurate(a, w, o)
    assert torch.equal(actual[1], actual[1].mT)


@pytest.mark.parametrize("window", [3, 5])
def test_is_the_covariance_of_the_gathered_samples(window: int) -> None:
    """The independent truth: gather every neighbour's embeddings and take torch.cov."""
    grid, channels = (5, 4), 6
    x = torch.randn(7, *grid, channels).double() + torch.arange(20.0).reshape(1, 5, 4, 1)
    mean, covariance = ops.window_covariance(*single(x), grid, window, 0, 20)
    for p in range(20):
        q = reference.window_positions(p, grid, window)
        samples = x.flatten(1, 2)[:, q].reshape(-1, channels)
        torch.testing.assert_close(mean[p].double(), samples.mean(0), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(covariance[p].double(), samples.T.cov(), rtol=1e-4, atol=1e-4)


def test_window_positions_are_clipped() -> None:
    assert reference.window_positions(0, (3, 4), 3).tolist() == [0, 1, 4, 5]
    assert reference.window_positions(6, (3, 4), 3).tolist() == [1, 2, 3, 5, 6, 7, 9, 10, 11]
    assert reference.window_positions(5, (3, 4), 99).tolist() == list(range(12))


def test_window_over_the_grid_is_one_global_gaussian() -> None:
    grid = (3, 5)
    x = torch.randn(4, *grid, 8)
    mean, covariance = ops.window_covariance(*single(x), grid, 9, 0, 15)
    samples = x.reshape(-1, 8)
    torch.testing.assert_close(mean, samples.mean(0).expand(15, 8), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(covariance, samples.T.cov().expand(15, 8, 8), rtol=1e-4, atol=1e-5)


def test_counts_weigh(isa: str) -> None:
    """Positions seen unequally often, one of them never."""
    grid, channels = (1, 3), 4
    parts = [torch.randn(n, 1, 1, channels).double() + n for n in (5, 0, 2)]
    states = [reference_moments(part) for part in parts]
    state = [torch.cat([s[i] for s in states]) for i in range(3)]
    mean, covariance = ops.window_covariance(
        state[0], state[1].float(), state[2].float(), grid, 3, 1, 2
    )
    samples = torch.cat(parts).reshape(7, channels)
    torch.testing.assert_close(mean[0].double(), samples.mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(covariance[0].double(), samples.T.cov(), rtol=1e-4, atol=1e-5)


def test_range_threads_and_rerun(isa: str) -> None:
    grid = (4, 5)
    state = single(torch.randn(6, *grid, 31))
    torch.set_num_threads(1)
    mean, covariance = ops.window_covariance(*state, grid, 3, 0, 20)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        part = ops.window_covariance(*state, grid, 3, 7, 13)
        assert torch.equal(part[0], mean[7:13])
        assert torch.equal(part[1], covariance[7:13])
    assert ops.window_covariance(*state, grid, 3, 5, 5)[1].shape == (0, 31, 31)


def test_large_window_in_blocks(isa: str) -> None:
    """More neighbours than the kernel takes at a time."""
    grid = (9, 9)
    state = single(torch.randn(3, *grid, 12))
    actual = ops.window_covariance(*state, grid, 9, 40, 41)
    oracle = reference.window_covariance(
        state[0], state[1].double(), state[2].double(), grid, 9, 40, 41
    )
    torch.testing.assert_close(actual[1].double(), oracle[1], rtol=1e-5, atol=1e-5)


def test_opcheck() -> None:
    state = single(torch.randn(3, 2, 3, 9))
    torch.library.opcheck(torch.ops.npad.window_covariance.default, (*state, [2, 3], 3, 1, 4))


def test_rejects() -> None:
    state = single(torch.randn(3, 2, 3, 4))
    with pytest.raises(ValueError, match="window must be odd and at least 1, got 2"):
        ops.window_covariance(*state, (2, 3), 2, 0, 6)
    with pytest.raises(ValueError, match="need 0 <= start <= stop <= 6, got start=4, stop=7"):
        ops.window_covariance(*state, (2, 3), 3, 4, 7)
    with pytest.raises(ValueError, match=r"count must have shape \(P\) = \(8,\), got \(6,\)"):
        ops.window_covariance(*state, (2, 4), 3, 0, 1)
