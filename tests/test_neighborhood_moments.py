"""neighborhood_moments: counts, means and scatters by Chan's formula."""

import numpy as np
import pytest
import torch
from accuracy import assert_accurate
from fitted import reference_moments, zeros
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from npad import ops
from npad.ops import reference
from npad.ops.packed import packed_layout


def moments(*batches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    _, height, width, channels = batches[0].shape
    state = zeros(height * width, channels)
    for batch in batches:
        ops.neighborhood_moments(batch, *state)
    return state


def check(x: Tensor, state: tuple[Tensor, Tensor, Tensor]) -> None:
    single, oracle = reference_moments(x.float(), torch.float32), reference_moments(x)
    assert torch.equal(state[0], oracle[0])
    assert_accurate(state[1], single[1], oracle[1])
    assert_accurate(state[2], single[2], oracle[2])


@pytest.mark.parametrize("channels", [1, 7, 8, 31, 100, 129])
@pytest.mark.parametrize("batch", [1, 2, 97, 200])
def test_against_reference(isa: str, batch: int, channels: int) -> None:
    x = torch.randn(batch, 2, 3, channels) * 2 + 1
    check(x, moments(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_input(dtype: torch.dtype) -> None:
    x = torch.randn(5, 2, 3, 31).to(dtype)
    check(x, moments(x))


def test_reference_is_numpy_covariance() -> None:
    x = torch.randn(40, 2, 2, 9)
    _, mean, scatter = reference_moments(x)
    for p in range(4):
        samples = x.flatten(1, 2)[:, p].double().numpy()
        np.testing.assert_allclose(mean[p], samples.mean(0))
        lower = np.tril(np.cov(samples, rowvar=False)) * 39
        np.testing.assert_allclose(reference.unpack(scatter[p], 9), lower, atol=1e-12)


def test_worked_by_hand() -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, 6.0]]).reshape(2, 1, 1, 2)
    count, mean, scatter = moments(x)
    assert count.tolist() == [2]
    assert mean.tolist() == [[2.0, 4.0]]
    assert reference.unpack(scatter, 2).tolist() == [[[2.0, 0.0], [4.0, 8.0]]]


@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    channels=st.integers(1, 20),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=40, deadline=None)
def test_batches_are_one_batch(sizes: list[int], channels: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(sizes), 2, 2, channels, generator=generator) * 3 + 5
    state = moments(*x.split(sizes))
    assert state[0].tolist() == [len(x)] * 4
    if len(x):
        oracle = reference_moments(x)
        torch.testing.assert_close(state[1].double(), oracle[1], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(state[2].double(), oracle[2], rtol=1e-4, atol=1e-3)


def test_offset_does_not_cancel(isa: str) -> None:
    """A scatter of 1 about a mean of 1e4 keeps its digits: nothing is a difference of squares."""
    x = torch.randn(64, 1, 2, 16)
    shifted = x + 1e4
    _, _, scatter = moments(*shifted.split(16))
    oracle = reference_moments(shifted)[2]
    assert (scatter - oracle).abs().max() < 2e-3 * oracle.abs().max()


def test_strided_view_and_threads(isa: str) -> None:
    x = torch.randn(5, 31, 4, 3).permute(0, 2, 3, 1)
    torch.set_num_threads(1)
    single = moments(x.contiguous())
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for a, b in zip(moments(x), single, strict=True):
            assert torch.equal(a, b)


def test_nan_stays_where_it_is() -> None:
    x = torch.randn(3, 1, 2, 4)
    x[1, 0, 1, 2] = torch.nan
    _, mean, scatter = moments(x)
    assert mean[0].isfinite().all()
    assert scatter[0].isfinite().all()
    assert mean[1].isnan().tolist() == [False, False, True, False]


def test_padding_stays_zero() -> None:
    state = moments(torch.randn(6, 1, 1, 13))
    row, column = packed_layout(13)
    assert (state[2][0][column > row] == 0).all()


def test_opcheck() -> None:
    torch.library.opcheck(
        torch.ops.npad.neighborhood_moments.default, (torch.randn(3, 2, 2, 9), *zeros(4, 9))
    )


def test_rejects() -> None:
    x, state = torch.randn(2, 2, 2, 4), zeros(4, 4)
    with pytest.raises(TypeError, match="x must be float32 or float16 or bfloat16, got float64"):
        ops.neighborhood_moments(x.double(), *state)
    with pytest.raises(ValueError, match=r"x must have shape \(N, H, W, C\)"):
        ops.neighborhood_moments(x[0], *state)
    with pytest.raises(ValueError, match=r"mean must have shape \(P, C\) = \(4, 4\), got \(4, 3\)"):
        ops.neighborhood_moments(x, state[0], state[1][:, :3], state[2])
    with pytest.raises(TypeError, match="count must be int64, got float32"):
        ops.neighborhood_moments(x, state[0].float(), *state[1:])
    with pytest.raises(ValueError, match="mean is updated in place and must be contiguous"):
        ops.neighborhood_moments(x, state[0], state[1].T.contiguous().T, state[2])
    with pytest.raises(ValueError, match="channels must be 1 to 4096, got 5000"):
        ops.neighborhood_moments(torch.zeros(1, 1, 1, 5000), *zeros(1, 1))
    assert state[0].sum() == 0
