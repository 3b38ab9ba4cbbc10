"""Statistics and factors for the op tests."""

from __future__ import annotations

import torch
from torch import Tensor

from npad import ops, reference

Moments = tuple[Tensor, Tensor, Tensor]


def zeros(positions: int, channels: int, dtype: torch.dtype = torch.float32) -> Moments:
    return (
        torch.zeros(positions, dtype=torch.int64),
        torch.zeros(positions, channels, dtype=dtype),
        torch.zeros(positions, ops.packed_size(channels), dtype=dtype),
    )


def reference_moments(x: Tensor, dtype: torch.dtype = torch.float64) -> Moments:
    moments = zeros(x.shape[1] * x.shape[2], x.shape[3], dtype)
    reference.neighborhood_moments(x.to(dtype), *moments)
    return moments


def gaussians(grid: tuple[int, int], channels: int) -> tuple[Tensor, Tensor]:
    """Random means and well-conditioned dense lower factors: (P, C), (P, C, C)."""
    positions = grid[0] * grid[1]
    mean = torch.randn(positions, channels)
    factor = torch.randn(positions, channels, channels).tril(-1) / channels**0.5
    return mean, factor + torch.eye(channels) * (0.5 + torch.rand(positions, channels, 1))
