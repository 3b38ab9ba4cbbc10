"""Fitting Gaussians: one batch of neighborhood_moments, and a whole fit with its finalize."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from npad import ops
from npad.ops import reference
from npad.statistics.gaussian import NeighborhoodGaussian


class Case(NamedTuple):
    P: int
    C: int
    batch: int


class Fit(NamedTuple):
    N: int
    P: int
    C: int


@pytest.mark.cases(cpu=[Case(1024, 384, 32)], cuda=[Case(1024, 1536, 32), Case(3136, 550, 32)])
@pytest.mark.benchmark(group="neighborhood_moments")
def bench_update(device: torch.device, case: Case, race: Any) -> None:
    """One batch after many: against plain PyTorch's update of a dense scatter."""
    positions, channels, batch = case
    torch.manual_seed(0)
    x = torch.randn(batch, positions, channels, device=device)
    count = torch.zeros(positions, dtype=torch.int64, device=device)
    mean = torch.zeros(positions, channels, device=device)
    scatter = torch.zeros(positions, ops.packed_size(channels), device=device)
    dense_count, dense_mean = 0, mean.clone()
    dense = torch.zeros(positions, channels, channels, device=device)

    def npad() -> None:
        ops.neighborhood_moments(x[:, None], count, mean, scatter)

    def pytorch() -> None:
        nonlocal dense_count
        total = dense_count + batch
        batch_mean = x.mean(0)
        delta = batch_mean - dense_mean
        correction = (dense_count * batch / total) ** 0.5 * delta
        rows = torch.cat([x - batch_mean, correction[None]]).transpose(0, 1)
        dense.baddbmm_(rows.mT, rows)
        dense_mean.add_(delta, alpha=batch / total)
        dense_count = total

    npad()
    pytorch()
    for p in range(0, positions, positions // 8):
        deviation = (x[:, p] - x[:, p].double().mean(0)).double()
        expected = deviation.T @ deviation
        for actual in (reference.unpack(scatter[p], channels), dense[p].tril()):
            torch.testing.assert_close(actual.double(), expected.tril(), rtol=1e-4, atol=1e-3)
    race(
        {"npad": npad, "pytorch": pytorch},
        rounds=15,
        n_bytes=x.nbytes + 2 * (scatter.nbytes + mean.nbytes + count.nbytes),
        n_flops=positions * channels * (channels + 1) * (batch + 1),
        products=("tf32", 3),
    )


@pytest.mark.cases(cpu=[Fit(762, 4096, 100)], cuda=[Fit(762, 4096, 100), Fit(256, 3136, 550)])
@pytest.mark.benchmark(group="moments + finalise")
def bench_fit(device: torch.device, case: Fit, race: Any) -> None:
    """Moments and finalize against anomalib's MultiVariateGaussian."""
    n, positions, channels = case
    side, batch, eps = int(positions**0.5), 32, 0.01
    torch.manual_seed(0)
    x = torch.randn(n, side, side, channels, device=device)
    channels_first = x.permute(0, 3, 1, 2).contiguous()  # as each library holds its embeddings

    def npad() -> tuple[Tensor, Tensor]:
        gaussian = NeighborhoodGaussian((side, side), channels, window=1, device=device)
        for part in x.split(batch):
            gaussian.update(part)
        return gaussian.finalize(eps)

    def pytorch() -> Tensor:
        deviation = (x - x.mean(0)).flatten(1, 2).permute(1, 0, 2)
        covariance = torch.bmm(deviation.mT, deviation) / (n - 1)
        covariance.diagonal(dim1=1, dim2=2).add_(eps)
        identity = torch.eye(channels, device=device).expand_as(covariance)
        lower = torch.linalg.cholesky(covariance)
        return torch.linalg.solve_triangular(lower, identity, upper=False)

    contenders = {"npad": npad, "pytorch": pytorch}

    def anomalib() -> object:
        try:
            from anomalib.models.components import MultiVariateGaussian
        except ImportError:  # what it does, position by position
            embedding = channels_first.flatten(2)
            covariances = torch.stack([embedding[:, :, p].T.cov() for p in range(positions)])
            covariances.diagonal(dim1=1, dim2=2).add_(eps)
            return embedding.mean(0), torch.linalg.inv(covariances)
        return MultiVariateGaussian().fit(channels_first)

    contenders["anomalib"] = anomalib

    mean, factor = npad()
    torch.testing.assert_close(mean, x.mean(0).flatten(0, 1), rtol=1e-4, atol=1e-5)
    unpacked = reference.unpack(factor[:64], channels)
    torch.testing.assert_close(unpacked, pytorch()[:64], rtol=1e-3, atol=1e-3)
    scatter = 4 * side * side * channels * (channels + 1) // 2
    race(
        contenders,
        rounds=3,
        n_bytes=x.nbytes + 2 * scatter * -(-n // batch),
        n_flops=n * side * side * channels * (channels + 1),
        products=("tf32", 3),
    )
