"""mahalanobis' CUDA kernel, run on the CPU."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_accurate
from simt_device import SM86, SM90, Simt, load
from torch import Tensor

from npad.check.cases import gaussians
from npad.ops import reference

TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8)  # in the order of DataType


@pytest.fixture(params=["simt_fast", "simt_fma", "simt_sm75", "simt_checked"])
def simt(request: pytest.FixtureRequest) -> Simt:
    return load(request.param)


def run(
    simt: Simt, x: Tensor, mean: Tensor, factor: Tensor, window: int, prefix: int | None = None
) -> Tensor:
    batch, height, width, channels = x.shape
    shape = (batch, height, width) if prefix is None else (2, batch, height, width)
    distance = torch.full(shape, -1.0)
    arguments = (mean, factor, TYPES.index(factor.dtype), window, prefix or 0, distance)
    simt("mahalanobis", x, batch, height, width, channels, *arguments)
    return distance


def check(
    simt: Simt,
    batch: int,
    grid: tuple[int, int],
    channels: int,
    window: int,
    dtype: torch.dtype = torch.float32,
    prefix: int | None = None,
) -> None:
    mean, dense = gaussians(grid, channels)
    factor = reference.pack_factor(dense, dtype)
    x = torch.randn(batch, *grid, channels)
    actual = run(simt, x, mean, factor, window, prefix)
    working = reference.mahalanobis(x, mean, factor, grid, window, prefix)
    doubles = x.double(), mean.double(), factor
    assert_accurate(actual, working, reference.mahalanobis(*doubles, grid, window, prefix))
    if prefix is not None:
        assert torch.equal(actual[1], run(simt, x, mean, factor, window))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("channels", [1, 7, 8, 17, 31, 33, 100, 129])
def test_channels(simt: Simt, channels: int, dtype: torch.dtype) -> None:
    check(simt, 1, (1, 2), channels, 1, dtype)


@pytest.mark.parametrize("dtype", TYPES)
def test_several_groups_of_panels_per_warp(dtype: torch.dtype) -> None:
    """13 groups on 4 warps; what a processor holds limits the embeddings of a block."""
    check(load("simt_fast"), 15, (1, 1), 830, 1, dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("batch", "channels"), [(32, 830), (25, 1100)])
def test_shared_memory_of_sm_90(batch: int, channels: int, dtype: torch.dtype) -> None:
    """Four tiles of embeddings in one block, and as many as fit, in two; elsewhere far fewer fit."""
    check(load("simt_fast", SM90), batch, (1, 1), channels, 1, dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("channels", "prefix"), [(2, 1), (17, 16), (31, 8), (33, 1), (100, 37), (129, 64), (129, 128)]
)
def test_prefix(simt: Simt, channels: int, prefix: int, dtype: torch.dtype) -> None:
    """At the border of a panel, of a group of them, within one; in one round of the warps, in two."""
    check(simt, 2, (1, 2), channels, 1, dtype, prefix)


def test_prefix_with_windows_and_several_groups() -> None:
    check(load("simt_fast"), 3, (3, 2), 17, 3, torch.float16, prefix=9)
    check(load("simt_fast"), 9, (1, 1), 830, 1, torch.float16, prefix=700)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("batch", "window"), [(1, 3), (2, 3), (8, 3), (2, 5), (4, 9)])
def test_windows(simt: Simt, batch: int, window: int, dtype: torch.dtype) -> None:
    """Borders; one to four tiles of embeddings, and more embeddings than one block holds."""
    check(simt, batch, (3, 4), 17, window, dtype)


@pytest.mark.parametrize("batch", [9, 33])
def test_batches(simt: Simt, batch: int) -> None:
    check(simt, batch, (1, 1), 31, 3)


def test_the_batch_does_not_change_a_distance(simt: Simt) -> None:
    grid = (1, 2)
    mean, dense = gaussians(grid, 33)
    factor = reference.pack_factor(dense, torch.float16)
    x = torch.randn(20, *grid, 33)
    together = run(simt, x, mean, factor, 3)
    for n in range(0, 20, 9):
        assert torch.equal(run(simt, x[n : n + 1], mean, factor, 3)[0], together[n])


def test_the_length_of_the_ring_does_not_change_a_distance() -> None:
    """Beside eight embeddings fit two steps on sm_86 and four on sm_90; a warp takes up to 26."""
    mean, dense = gaussians((1, 1), 830)
    factor = reference.pack_factor(dense, torch.int8)
    x = torch.randn(8, 1, 1, 830)
    few, many = (run(load("simt_fast", shared), x, mean, factor, 1) for shared in (SM86, SM90))
    assert torch.equal(few, many)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("window", [1, 3])
def test_nan_propagates(simt: Simt, window: int, dtype: torch.dtype) -> None:
    grid = (3, 3)
    mean, dense = gaussians(grid, 10)
    factor = reference.pack_factor(dense, dtype)
    x = torch.randn(3, *grid, 10)
    x[1, 1, 1, 4] = torch.nan
    x[2, 0, 2, 9] = torch.inf  # times the zeros beside it
    nan = run(simt, x, mean, factor, window).isnan().nonzero().tolist()
    assert nan == [[1, 1, 1], [2, 0, 2]]
    dense[0] = torch.nan
    factor = reference.pack_factor(dense, dtype)
    reached = [[0, 0], [0, 1], [1, 0], [1, 1]] if window == 3 else [[0, 0]]
    nan = run(simt, x[:1].contiguous(), mean, factor, window).isnan()
    assert nan[0].nonzero().tolist() == reached


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("window", [1, 3])
def test_extremes(simt: Simt, window: int, dtype: torch.dtype) -> None:
    """Zero at the mean, which all Gaussians share here; infinite, not NaN, beyond range."""
    mean = torch.randn(9).expand(4, 9).contiguous()
    factor = reference.pack_factor(torch.eye(9).expand(4, 9, 9), dtype)
    x = mean.reshape(1, 2, 2, 9).clone()
    assert (run(simt, x, mean, factor, window) == 0).all()
    assert run(simt, x + 1e30, mean, factor, window).isinf().all()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_channels_of_different_scales(simt: Simt, size: float, dtype: torch.dtype) -> None:
    """Deviations from 2^-20 to 1 in one embedding, each as far in standard deviations."""
    channels = 21
    deviation = 2.0 ** -torch.arange(channels)
    mean, dense = gaussians((1, 1), channels)
    factor = reference.pack_factor(2.0**-10 * dense / deviation, dtype)
    x = size * deviation * (1 + torch.rand(1, 1, 1, channels))
    mean.zero_()
    actual = run(simt, x, mean, factor, 1)
    working = reference.mahalanobis(x, mean, factor, (1, 1))
    oracle = reference.mahalanobis(x.double(), mean.double(), factor, (1, 1))
    assert_accurate(actual, working, oracle)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_factor_values(dtype: torch.dtype) -> None:
    """Of every kind, subnormals and zeros of both signs too, exactly."""
    values = torch.arange(-(2**15), 2**15, 31).to(torch.int16).view(dtype)
    values = values[values.isfinite() & (values.float().abs() < 1e18)]  # its square stays finite
    values = values[(values == 0) | (values.float().abs() > 1e-18)]  # and normal
    factor = torch.zeros(len(values), 8, dtype=dtype)
    factor[:, -1] = values  # 1 x 1 factors: seven rows of padding, then the value
    x = torch.ones(1, 1, len(values), 1)
    distance = run(load("simt_fast"), x, torch.zeros(len(values), 1), factor, 1)
    assert torch.equal(distance.flatten(), values.float().abs())


@pytest.mark.parametrize(("batch", "width"), [(0, 3), (2, 0)])
def test_nothing_to_do(simt: Simt, batch: int, width: int) -> None:
    mean, dense = gaussians((2, width), 5)
    x = torch.empty(batch, 2, width, 5)
    run(simt, x, mean, reference.pack_factor(dense, torch.float32), 3)
