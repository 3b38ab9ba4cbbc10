"""inverse_cholesky against torch.linalg, from covariance to packed factor."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from npad import ops


class Case(NamedTuple):
    C: int
    megabytes: int  # of covariances


@pytest.mark.cases(
    cpu=[Case(c, 64) for c in (100, 384, 550, 1536)],
    cuda=[Case(c, 512) for c in (100, 384, 550, 1536)],
)
@pytest.mark.benchmark(group="inverse_cholesky")
def bench_inverse_cholesky(device: torch.device, case: Case, race: Any) -> None:
    channels = case.C
    count = max(6, (case.megabytes << 20) // (4 * channels**2))
    torch.manual_seed(0)
    x = torch.randn(count, channels + 20, channels, device=device)
    eye = torch.eye(channels, device=device)
    covariance = x.mT @ x / (channels + 20) + 0.01 * eye
    identity = eye.expand_as(covariance)

    def npad() -> Tensor:
        return ops.inverse_cholesky(covariance)[0]

    def dense() -> Tensor:
        lower = torch.linalg.cholesky(covariance)
        return torch.linalg.solve_triangular(lower, identity, upper=False)

    contenders = {"npad": npad, "torch.linalg, not packed": dense}
    torch.testing.assert_close(npad(), ops.pack_factor(dense()), rtol=1e-3, atol=1e-3)
    race(
        contenders,
        rounds=5,
        n_bytes=4 * count * (channels * (channels + 1) // 2 + ops.packed_size(channels)),
        n_flops=2 * count * channels**3 // 3,
    )
