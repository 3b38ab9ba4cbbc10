"""Statistics and factors for the op tests."""

from __future__ import annotations

import torch
from torch import Tensor

from npad import ops
from npad.ops import reference

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


SINGULAR = ["constant channels", "duplicates", "large", "dead position"]


def singular(case: str, shape: tuple[int, int, int, int]) -> Tensor:
    """Embeddings (N, H, W, C) whose covariances no float32 can factor as they are."""
    x = torch.randn(shape)
    if case == "constant channels":
        x[..., 3:6] = 2.5
    elif case == "duplicates":
        x = x[:1].repeat(len(x), 1, 1, 1)
    elif case == "large":
        x = x * 1e4 + 1e4
        x[..., 5] = x[..., :5].sum(-1)
    else:
        x[:, :3, :3] = 0.0
    return x


def covariances(count: int, channels: int, eps: float = 0.01) -> Tensor:
    """Of features whose scales span two decades, as those of a network do."""
    x = torch.randn(count, channels + 5, channels) * torch.logspace(-1, 1, channels)
    return x.mT @ x / (channels + 5) + eps * torch.eye(channels)


def whitening_error(factor: Tensor, covariance: Tensor) -> float:
    """The independent truth: W Sigma W^T is the identity. Largest deviation from it."""
    dense = reference.unpack(factor, covariance.shape[1]).double()
    white = dense @ covariance.double() @ dense.mT
    return float((white - torch.eye(covariance.shape[1]).double()).abs().max())
