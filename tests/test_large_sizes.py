"""More than 2^31 elements, whose offsets no 32 bits hold: the kernels must find the last of them.

Most of the memory is zeros that are never written, so that on the CPU it costs addresses, not pages.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from simt_device import load
from torch import Tensor

from npad import ops

pytestmark = pytest.mark.slow
LIMIT = 2**31
GRID, CHANNELS = (8000, 8), 256


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


def zeros(*shape: int, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    if device == "cpu":  # PyTorch would write them
        name = str(dtype).removeprefix("torch.")
        x = torch.from_numpy(np.zeros(shape, name))
    else:
        x = torch.zeros(shape, dtype=dtype, device=device)
    assert x.numel() > LIMIT
    return x


def last_statistics(device: str) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, Tensor]:
    """Of which the last two positions alone hold samples; their mean and covariance."""
    p, c = GRID[0] * GRID[1], CHANNELS
    state = (
        torch.zeros(p, dtype=torch.int64, device=device),
        torch.zeros(p, c, device=device),
        zeros(p, ops.packed_size(c), device=device),
    )
    samples = torch.randn(6, 1, 2, c, device=device)
    ops.neighborhood_moments(samples, *(s[-2:] for s in state))
    both = samples.flatten(0, 2).double()
    return state, both.mean(0), both.T.cov()


def assert_last(mean: Tensor, covariance: Tensor, *expected: Tensor) -> None:
    torch.testing.assert_close(mean.double(), expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(covariance.double(), expected[1], rtol=1e-4, atol=1e-5)


def test_window_covariance(device: str) -> None:
    state, *expected = last_statistics(device)
    mean, covariance = ops.window_covariance(*state, GRID, 3, 63_999, 64_000)
    assert_last(mean[0], covariance[0], *expected)


def test_window_covariance_in_the_emulator() -> None:
    state, *expected = last_statistics("cpu")
    mean, covariance = torch.empty(1, CHANNELS), torch.empty(1, CHANNELS, CHANNELS)
    sizes = (*GRID, CHANNELS, 3, 63_999, 64_000)
    load("simt_fast").once("window_covariance", *state, *sizes, mean, covariance)
    assert_last(mean[0], covariance[0], *expected)


def test_neighborhood_moments(device: str) -> None:
    state, *_ = last_statistics(device)
    expected = [s[-2:].clone() for s in state]
    x = torch.randn(3, *GRID, CHANNELS, device=device)
    ops.neighborhood_moments(x, *state)
    ops.neighborhood_moments(x[:, -1:, -2:], *expected)
    for actual, wanted in zip(state, expected, strict=True):
        assert torch.equal(actual[-2:], wanted)


def test_mahalanobis(device: str) -> None:
    p, c = 4100, 1024
    factor = zeros(p, ops.packed_size(c), device=device, dtype=torch.float16)
    identity = torch.eye(c, device=device)
    factor[-1:] = ops.pack_factor(identity[None], torch.float16)
    x, mean = torch.randn(1, 1, p, c, device=device), torch.randn(p, c, device=device)
    distance = ops.mahalanobis(x, mean, factor, (1, p)).flatten()
    torch.testing.assert_close(distance[-1], (x[0, 0, -1] - mean[-1]).norm())
    assert (distance[:-1] == 0).all()


def test_pack_factor(device: str) -> None:
    """Into more than 2^31 elements, too."""
    dense = zeros(4100, 1024, 1024, device=device) if device == "cuda" else None
    if dense is None:  # half of it, whose result alone takes memory
        dense = zeros(2050, 1024, 1024, device=device)
    dense[-1] = torch.randn(1024, 1024, device=device)
    packed = ops.pack_factor(dense, torch.float16 if device == "cuda" else torch.float32)
    assert torch.equal(packed[-1:], ops.pack_factor(dense[-1:], packed.dtype))
    assert not packed[-2].any()


def test_inverse_cholesky(device: str) -> None:
    covariance = zeros(32_800, 256, 256, device=device)
    covariance.diagonal(dim1=1, dim2=2)[-2:] = 4
    factor, info = ops.inverse_cholesky(covariance)
    half = ops.pack_factor(torch.eye(256, device=device)[None] / 2)
    assert torch.equal(factor[-2:], half.expand(2, -1))
    assert info[-3:].tolist() == [1, 0, 0]


def test_nearest_centroid(device: str) -> None:
    x = zeros(2**19 + 70, 4096, device=device)
    centroids = torch.randn(3, 4096, device=device)
    x[-1], centroids[0] = centroids[1], 0
    distance, index = ops.nearest_centroid(x, centroids)
    assert index[-2:].tolist() == [0, 1]
    assert not index[:-1].any()
    assert (distance == 0).all()


def test_farthest_first(device: str) -> None:
    points = zeros(2**20 + 70, 2048, device=device)
    points[-1], points[-2] = 2, 1
    index, radius = ops.farthest_first(points, 3)
    assert index.tolist() == [0, len(points) - 1, len(points) - 2]
    torch.testing.assert_close(radius.cpu(), torch.tensor([2.0, 1.0, 0.0]) * 2048**0.5)
