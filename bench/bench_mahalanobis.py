"""mahalanobis against anomalib's expression and the best plain-PyTorch form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from npad import ops, reference

CASES = [(32, 384), (56, 550)]  # side of the grid, channels


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"P{case[0] ** 2}-C{case[1]}")
def gaussians(request: pytest.FixtureRequest) -> tuple[int, Tensor, Tensor, Tensor, Tensor]:
    """Side, means, packed float32 factors, dense factors W and precisions W^T W."""
    side, channels = request.param
    torch.manual_seed(0)
    positions = side * side
    packed = torch.randn(positions, ops.packed_size(channels)).div_(channels**0.5)
    row, column = reference.packed_layout(channels)
    packed[:, column > row] = 0
    dense = torch.stack([reference.unpack(p, channels) for p in packed])
    return side, torch.randn(positions, channels), packed, dense, dense.mT @ dense


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("batch", [1, 16], ids=["batch1", "batch16"])
@pytest.mark.benchmark(group="mahalanobis")
def bench_mahalanobis(
    gaussians: tuple[int, Tensor, Tensor, Tensor, Tensor],
    batch: int,
    dtype: torch.dtype,
    threads: int,
    race: Any,
) -> None:
    side, mean, packed, dense, precision = gaussians
    grid, (positions, channels) = (side, side), mean.shape
    factor = packed.to(dtype)
    x = torch.randn(batch, side, side, channels)
    channels_first = x.permute(0, 3, 1, 2).contiguous()  # as each library holds its embeddings

    def npad(window: int = 1) -> Tensor:
        return ops.mahalanobis(x, mean, factor, grid, window)

    def anomalib() -> Tensor:
        embedding = channels_first.reshape(batch, channels, positions)
        delta = (embedding - mean.T).permute(2, 0, 1)
        squared = (torch.matmul(delta, precision) * delta).sum(2).permute(1, 0)
        return squared.reshape(batch, 1, side, side).clamp(0).sqrt()

    def pytorch() -> Tensor:
        z = (x.reshape(batch, positions, channels) - mean).permute(1, 2, 0)
        return torch.linalg.vector_norm(torch.bmm(dense, z), dim=1).T.reshape(batch, side, side)

    tolerance = {"rtol": 2e-3, "atol": 2e-3}
    torch.testing.assert_close(npad(), pytorch(), **tolerance)
    torch.testing.assert_close(npad(), anomalib()[:, 0], **tolerance)
    contenders = {"npad": npad, "anomalib": anomalib, "pytorch": pytorch}
    if batch == 1:
        contenders["npad window 3"] = lambda: npad(3)
    race(
        contenders,
        rounds=11 if batch == 1 else 5,
        n_bytes=factor.nbytes + x.nbytes + mean.nbytes,
        n_flops=batch * positions * channels * (channels + 1),
    )
