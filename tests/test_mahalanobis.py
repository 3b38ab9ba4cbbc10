"""mahalanobis: distance to the nearest Gaussian of the window."""

import numpy as np
import pytest
import torch
from accuracy import assert_accurate
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from npad import ops
from npad.check.cases import gaussians
from npad.ops import reference


def double(x: Tensor, mean: Tensor, factor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The reference takes a factor's own numbers in the precision of the mean."""
    return x.double(), mean.double(), factor


@pytest.mark.parametrize("dtype", ops.FACTOR_DTYPES)
@pytest.mark.parametrize("window", [1, 3, 9])
@pytest.mark.parametrize("channels", [1, 7, 8, 31, 100, 129])
def test_against_reference(isa: str, channels: int, window: int, dtype: torch.dtype) -> None:
    grid = (4, 3)
    mean, dense = gaussians(grid, channels)
    factor = ops.pack_factor(dense, dtype)
    x = torch.randn(2, *grid, channels)
    actual = ops.mahalanobis(x, mean, factor, grid, window)
    working = reference.mahalanobis(x, mean, factor, grid, window)
    oracle = reference.mahalanobis(*double(x, mean, factor), grid, window)
    assert_accurate(actual, working, oracle)


@pytest.mark.parametrize("batch", [0, 1, 5, 13, 70])
def test_batches(isa: str, batch: int) -> None:
    """Batch x window from none to more embeddings than one pass over a factor holds."""
    grid = (3, 3)
    mean, dense = gaussians(grid, 19)
    factor = ops.pack_factor(dense)
    x = torch.randn(batch, *grid, 19)
    actual = ops.mahalanobis(x, mean, factor, grid, 5)
    oracle = reference.mahalanobis(*double(x, mean, factor), grid, 5)
    assert actual.shape == (batch, 3, 3)
    torch.testing.assert_close(actual.double(), oracle, rtol=1e-5, atol=1e-5)
    for n in range(0, batch, 7):
        assert torch.equal(ops.mahalanobis(x[n : n + 1], mean, factor, grid, 5)[0], actual[n])


@pytest.mark.parametrize("dtype", ops.FACTOR_DTYPES)
@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize(
    ("channels", "prefix"),
    [(2, 1), (8, 3), (31, 8), (31, 30), (33, 1), (100, 37), (129, 64), (129, 96), (176, 128)],
)
def test_prefix(isa: str, channels: int, prefix: int, window: int, dtype: torch.dtype) -> None:
    """At the border of a panel, of a group of them, within one; of a short panel."""
    grid = (4, 3)
    mean, dense = gaussians(grid, channels)
    factor = ops.pack_factor(dense, dtype)
    x = torch.randn(7, *grid, channels)
    actual = ops.mahalanobis(x, mean, factor, grid, window, prefix)
    working = reference.mahalanobis(x, mean, factor, grid, window, prefix)
    oracle = reference.mahalanobis(*double(x, mean, factor), grid, window, prefix)
    assert_accurate(actual, working, oracle)
    assert torch.equal(actual[1], ops.mahalanobis(x, mean, factor, grid, window))


def test_a_prefix_is_the_gaussian_of_its_channels(isa: str) -> None:
    """By the leading block of the covariance, which no factor of the whole is needed for."""
    grid, channels, prefix = (2, 3), 21, 13
    samples = np.random.default_rng(0).normal(size=(6, 60, channels))
    covariance = np.stack([np.cov(s.T) for s in samples])
    mean = samples.mean(1)
    factor = torch.from_numpy(np.linalg.inv(np.linalg.cholesky(covariance))).float()
    x = torch.randn(4, *grid, channels)
    z = x.numpy().reshape(4, 6, channels).astype(float) - mean
    expected = [
        np.sqrt(
            np.einsum(
                "npi,pij,npj->np", z[..., :n], np.linalg.inv(covariance[:, :n, :n]), z[..., :n]
            )
        )
        for n in (prefix, channels)
    ]
    found = ops.mahalanobis(
        x, torch.from_numpy(mean).float(), ops.pack_factor(factor), grid, 1, prefix
    )
    np.testing.assert_allclose(found.reshape(2, 4, 6), expected, rtol=1e-4)


@pytest.mark.parametrize("hostile", [torch.nan, torch.inf, -torch.inf, 1e30])
@pytest.mark.parametrize("dtype", ops.FACTOR_DTYPES)
@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize(("channels", "prefix"), [(16, 8), (16, 5), (19, 2), (47, 17), (129, 96)])
def test_what_lies_behind_a_prefix_does_not_touch_it(
    isa: str, channels: int, prefix: int, window: int, dtype: torch.dtype, hostile: float
) -> None:
    """The next channel, which the rows above multiply by zero, and the last one."""
    grid = (3, 3)
    mean, dense = gaussians(grid, channels)
    factor = ops.pack_factor(dense, dtype)
    x = torch.randn(14, *grid, channels)
    expected = ops.mahalanobis(x, mean, factor, grid, window, prefix)
    for channel in (prefix, channels - 1):
        y = x.clone()
        y[3, 1, 1, channel] = hostile
        within, whole = ops.mahalanobis(y, mean, factor, grid, window, prefix)
        assert torch.equal(within, expected[0])
        assert torch.equal(
            whole.nan_to_num(-1), ops.mahalanobis(y, mean, factor, grid, window).nan_to_num(-1)
        )
    y = x.clone()
    y[3, 1, 1, prefix - 1] = torch.nan
    for distance in ops.mahalanobis(y, mean, factor, grid, window, prefix):
        assert distance.isnan().nonzero().tolist() == [[3, 1, 1]]


def test_a_prefix_takes_any_batch_and_number_of_threads(isa: str) -> None:
    """More embeddings than one pass over a factor holds, and none."""
    grid = (3, 3)
    mean, dense = gaussians(grid, 43)
    factor = ops.pack_factor(dense)
    x = torch.randn(70, *grid, 43)
    torch.set_num_threads(1)
    expected = ops.mahalanobis(x, mean, factor, grid, 5, 20)
    torch.set_num_threads(3)
    assert torch.equal(ops.mahalanobis(x, mean, factor, grid, 5, 20), expected)
    one = ops.mahalanobis(x[69:], mean, factor, grid, 5, 20)
    assert torch.equal(one[:, 0], expected[:, 69])
    assert ops.mahalanobis(x[:0], mean, factor, grid, 5, 20).shape == (2, 0, 3, 3)


@pytest.mark.parametrize("prefix", [0, -1, 5, 6])
def test_what_is_no_prefix(prefix: int) -> None:
    mean, dense = gaussians((1, 2), 5)
    with pytest.raises(ValueError, match=rf"prefix must be 1 to 4 of 5 channels, got {prefix}"):
        ops.mahalanobis(torch.randn(1, 1, 2, 5), mean, ops.pack_factor(dense), (1, 2), 1, prefix)


def test_reference_is_the_textbook_distance() -> None:
    grid, channels = (2, 2), 5
    samples = torch.randn(4, 30, channels).double()
    covariance = torch.stack([s.T.cov() for s in samples])
    mean = samples.mean(1)
    factor = torch.linalg.inv(torch.linalg.cholesky(covariance))
    x = torch.randn(1, *grid, channels).double()
    z = x.reshape(4, channels) - mean
    squared = torch.einsum("pi,pij,pj->p", z, torch.linalg.inv(covariance), z)
    actual = reference.mahalanobis(x, mean, reference.pack(factor), grid)
    torch.testing.assert_close(actual.flatten(), squared.sqrt())


@given(channels=st.integers(1, 40), seed=st.integers(0, 2**16))
@settings(max_examples=30, deadline=None)
def test_properties(channels: int, seed: int) -> None:
    torch.manual_seed(seed)
    grid = (2, 3)
    mean, dense = gaussians(grid, channels)
    factor = ops.pack_factor(dense)
    at_mean = mean.reshape(1, *grid, channels)
    assert (ops.mahalanobis(at_mean, mean, factor, grid, 3) == 0).all()

    identity = ops.pack_factor(torch.eye(channels).expand(6, -1, -1).contiguous())
    x = torch.randn(2, *grid, channels)
    euclidean = (x - at_mean).norm(dim=-1)
    torch.testing.assert_close(ops.mahalanobis(x, mean, identity, grid), euclidean)

    narrow, wide = (ops.mahalanobis(x, mean, factor, grid, w) for w in (1, 3))
    assert (wide <= narrow).all()


def test_invariant_under_affine_maps() -> None:
    """x -> A x + b moves the Gaussians with it and leaves every distance."""
    grid, channels = (2, 2), 6
    samples = torch.randn(50, 4, channels).double()
    a = torch.randn(channels, channels).double() + 3 * torch.eye(channels)
    b = torch.randn(channels).double()

    def distances(points: Tensor, x: Tensor) -> Tensor:
        covariance = torch.stack([points[:, p].T.cov() for p in range(4)])
        factor = torch.linalg.inv(torch.linalg.cholesky(covariance)).float()
        mean = points.mean(0).float()
        return ops.mahalanobis(x.float(), mean, ops.pack_factor(factor), grid, 3)

    x = torch.randn(2, *grid, channels).double()
    expected = distances(samples, x)
    actual = distances(samples @ a.T + b, x @ a.T + b)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


def test_nan_propagates(isa: str) -> None:
    grid = (3, 3)
    mean, dense = gaussians(grid, 10)
    factor = ops.pack_factor(dense)
    x = torch.randn(1, *grid, 10)
    x[0, 1, 1, 4] = torch.nan
    nan = ops.mahalanobis(x, mean, factor, grid, 3).isnan()
    assert nan.nonzero().tolist() == [[0, 1, 1]]  # one embedding, no other
    mean[0] = torch.nan
    nan = ops.mahalanobis(torch.randn(1, *grid, 10), mean, factor, grid, 3).isnan()
    assert nan.nonzero().tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1]]


def test_overflow_is_infinite_not_nan(isa: str) -> None:
    mean, _ = gaussians((1, 1), 9)
    x = torch.full((1, 1, 1, 9), 1e30)
    assert ops.mahalanobis(x, mean, ops.pack_factor(torch.eye(9)[None]), (1, 1)).isinf().all()


def test_strides_threads_and_rerun(isa: str) -> None:
    grid = (5, 4)
    mean, dense = gaussians(grid, 31)
    factor = ops.pack_factor(dense, torch.float16)
    x = torch.randn(3, 31, *grid).permute(0, 2, 3, 1)
    torch.set_num_threads(1)
    expected = ops.mahalanobis(x.contiguous(), mean, factor, grid, 3)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(ops.mahalanobis(x, mean, factor, grid, 3), expected)
    half = x.half()
    assert torch.equal(
        ops.mahalanobis(half, mean, factor, grid, 3),
        ops.mahalanobis(half.float(), mean, factor, grid, 3),
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_factor_value(isa: str, dtype: torch.dtype) -> None:
    """Loads widen every finite bit pattern, subnormals and zeros of both signs too, exactly."""
    values = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    values = values[values.isfinite() & (values.float().abs() < 1e18)]  # its square stays finite
    factor = torch.zeros(len(values), ops.packed_size(1), dtype=dtype)
    factor[:, -1] = values  # 1 x 1 factors: seven rows of padding, then the value
    x = torch.ones(1, 1, len(values), 1)
    distance = ops.mahalanobis(x, torch.zeros(len(values), 1), factor, (1, len(values)))
    wide = values.float().numpy()
    expected = np.sqrt(wide * wide)  # torch.sqrt of subnormals is inexact on some processors
    np.testing.assert_array_equal(distance.flatten(), expected)


def test_opcheck_and_compile() -> None:
    grid = (2, 3)
    mean, dense = gaussians(grid, 9)
    x, factor = torch.randn(2, *grid, 9), ops.pack_factor(dense)
    for prefix in (None, 4):
        arguments = (x, mean, factor, [2, 3], 3, prefix)
        torch.library.opcheck(torch.ops.npad.mahalanobis.default, arguments)


def test_rejects() -> None:
    grid = (2, 3)
    mean, dense = gaussians(grid, 9)
    x, factor = torch.randn(2, *grid, 9), ops.pack_factor(dense)
    with pytest.raises(ValueError, match="window must be odd and at least 1, got 4"):
        ops.mahalanobis(x, mean, factor, grid, 4)
    with pytest.raises(ValueError, match=r"x must have shape \(N, H, W, C\) = \(2, 3, 2, 9\)"):
        ops.mahalanobis(x, mean, factor, (3, 2))
    with pytest.raises(ValueError, match=r"mean must have shape \(P, C\) = \(6, 9\), got \(6, 8\)"):
        ops.mahalanobis(x, mean[:, :8], factor, grid)
    with pytest.raises(ValueError, match=r"factor must have shape \(P, stored\)"):
        ops.mahalanobis(x, mean, factor[:, :-1], grid)
    with pytest.raises(ValueError, match=r"factor must have shape \(P, stored\) = \(6, 96\)"):
        ops.mahalanobis(x, mean, factor.to(torch.int8), grid)  # without scales
    with pytest.raises(TypeError, match="factor must be float32 or float16 or bfloat16 or int8"):
        ops.mahalanobis(x, mean, factor.double(), grid)
    with pytest.raises(ValueError, match="mean is on meta but x is on cpu"):
        ops.mahalanobis(x, mean.to("meta"), factor, grid)
