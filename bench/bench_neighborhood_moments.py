"""Fitting Gaussians: neighborhood_moments and finalize against anomalib's MultiVariateGaussian."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from npad.gaussian import NeighborhoodGaussian


@pytest.mark.benchmark(group="moments + finalise")
def bench_fit(threads: int, race: Any) -> None:
    n, side, channels, batch, eps = 762, 64, 100, 32, 0.01
    torch.manual_seed(0)
    x = torch.randn(n, side, side, channels)
    channels_first = x.permute(0, 3, 1, 2).contiguous()  # as each library holds its embeddings

    def npad() -> tuple[Tensor, Tensor]:
        gaussian = NeighborhoodGaussian((side, side), channels, window=1)
        for part in x.split(batch):
            gaussian.update(part)
        return gaussian.finalize(eps)

    def pytorch() -> Tensor:
        deviation = (x - x.mean(0)).flatten(1, 2).permute(1, 0, 2)
        covariance = torch.bmm(deviation.mT, deviation) / (n - 1)
        covariance.diagonal(dim1=1, dim2=2).add_(eps)
        identity = torch.eye(channels).expand_as(covariance)
        lower = torch.linalg.cholesky(covariance)
        return torch.linalg.solve_triangular(lower, identity, upper=False)

    contenders = {"npad": npad, "pytorch": pytorch}
    try:
        from anomalib.models.components import MultiVariateGaussian
    except ImportError:
        pass
    else:

        def anomalib() -> list[Tensor]:
            return MultiVariateGaussian().fit(channels_first)

        contenders["anomalib"] = anomalib

    row = torch.arange(channels)
    mean, factor = npad()
    dense = pytorch()
    torch.testing.assert_close(mean, x.mean(0).flatten(0, 1), rtol=1e-4, atol=1e-5)
    diagonal = dense[:, row, row].log().sum(1)
    from npad import reference

    packed = torch.stack([reference.unpack(f, channels)[row, row] for f in factor[:64]])
    torch.testing.assert_close(packed.log().sum(1), diagonal[:64], rtol=1e-3, atol=1e-3)
    scatter = 4 * side * side * channels * (channels + 1) // 2
    race(
        contenders,
        rounds=3,
        n_bytes=x.nbytes + 2 * scatter * -(-n // batch),
        n_flops=n * side * side * channels * (channels + 1),
    )
