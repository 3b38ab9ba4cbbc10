"""window_covariance against sums of shifted dense scatters, which is how plain PyTorch does it best."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from npad import ops
from npad.ops import reference
from npad.ops.packed import packed_layout


class Case(NamedTuple):
    P: int
    C: int
    window: int


def window_sums(x: Tensor, radius: int) -> Tensor:
    """Of (H, W, ...) over the window, clipped at the border: down, then across."""
    for axis in (0, 1):
        total, size = x.clone(), x.shape[axis]
        for shift in range(1, radius + 1):
            total.narrow(axis, shift, size - shift).add_(x.narrow(axis, 0, size - shift))
            total.narrow(axis, 0, size - shift).add_(x.narrow(axis, shift, size - shift))
        x = total
    return x


def neighbors(x: Tensor, radius: int) -> Tensor:
    """(H, W, ...) -> (P, window^2, ...), zeros beyond the border."""
    height, width = x.shape[:2]
    size = 2 * radius + 1
    padded = pad(x, [0, 0] * (x.ndim - 2) + [radius, radius] * 2)
    shifted = [padded[y : y + height, z : z + width] for y in range(size) for z in range(size)]
    return torch.stack(shifted, 2).flatten(0, 1)


@pytest.mark.cases(
    cpu=[Case(1024, 100, 3), Case(1024, 384, 3)],
    cuda=[Case(1024, 384, 3), Case(3136, 550, 3), Case(1024, 1536, 3)],
)
@pytest.mark.benchmark(group="window_covariance")
def bench_window_covariance(device: torch.device, case: Case, race: Any) -> None:
    positions, channels, window = case
    side, radius = int(positions**0.5), window // 2
    torch.manual_seed(0)
    count = torch.randint(20, 40, (positions,), device=device)
    mean = torch.randn(positions, channels, device=device)
    scatter = torch.rand(positions, ops.packed_size(channels), device=device)
    row, column = (index.to(device) for index in packed_layout(channels))
    scatter.mul_(column <= row)
    lower = torch.cat([reference.unpack(part, channels) for part in scatter.split(64)])
    dense = (lower + lower.tril(-1).mT).view(side, side, channels, channels)
    del lower

    def npad() -> tuple[Tensor, Tensor]:
        return ops.window_covariance(count, mean, scatter, (side, side), window, 0, positions)

    def pytorch() -> tuple[Tensor, Tensor]:
        near = neighbors(count.view(side, side, 1).float(), radius)  # (P, window^2, 1)
        means = neighbors(mean.view(side, side, channels), radius)
        n = near.sum(1)
        mu = (near * means).sum(1) / n
        deviation = near.sqrt() * (means - mu[:, None])
        within = window_sums(dense, radius).flatten(0, 1)
        between = within.baddbmm_(deviation.mT, deviation)
        return mu, between.div_(n[..., None] - 1)

    grid = (side, side)
    sample = range(0, positions, positions // 8)
    expected = [
        reference.window_covariance(count, mean, scatter, grid, window, p, p + 1) for p in sample
    ]
    for function in (npad, pytorch):
        mu, covariance = function()
        for p, (expected_mu, expected_covariance) in zip(sample, expected, strict=True):
            torch.testing.assert_close(mu[p], expected_mu[0], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(covariance[p], expected_covariance[0], rtol=1e-4, atol=1e-4)
        del mu, covariance
    outputs = positions * channels * (channels + 1)
    race(
        {"npad": npad, "pytorch": pytorch},
        rounds=5,
        n_bytes=4 * positions * (ops.packed_size(channels) + channels * (channels + 2))
        + mean.nbytes,
        n_flops=outputs * 3 * window**2 // 2,
    )
