"""Singular and badly scaled covariances through the CUDA kernels of a fit, run on the CPU."""

from __future__ import annotations

import pytest
import torch
from fitted import SINGULAR, singular, zeros
from simt_device import Simt, load

from npad import ops
from npad.statistics.gaussian import NeighborhoodGaussian

GRID, CHANNELS = (4, 5), 10


@pytest.fixture(params=["simt_fast", "simt_fma", "simt_sm75"])
def simt(request: pytest.FixtureRequest) -> Simt:
    return load(request.param)


@pytest.mark.parametrize("case", SINGULAR)
def test_scores_are_those_of_the_cpu(simt: Simt, case: str) -> None:
    x = singular(case, (12, *GRID, CHANNELS))
    gaussian = NeighborhoodGaussian(GRID, CHANNELS).update(x)
    _, eps = gaussian.choose(x[:3] * 1.01, [3])
    expected = ops.mahalanobis(x, *gaussian.finalize(eps), GRID)

    state = zeros(20, CHANNELS)
    simt("neighborhood_moments", x, len(x), 20, CHANNELS, *state)
    mean, covariance = torch.empty(20, CHANNELS), torch.empty(20, CHANNELS, CHANNELS)
    simt("window_covariance", *state, *GRID, CHANNELS, 3, 0, 20, mean, covariance)
    covariance.diagonal(dim1=1, dim2=2).add_(eps)
    factor = torch.empty(20, ops.packed_size(CHANNELS))
    info = torch.full((20,), -1, dtype=torch.int32)
    workspace = simt.workspace("inverse_cholesky", 20, CHANNELS)
    simt("inverse_cholesky", covariance, 20, CHANNELS, workspace, factor, 0, info)
    assert not info.any()
    distance = torch.empty(12, *GRID)
    simt("mahalanobis", x, 12, *GRID, CHANNELS, mean, factor, 0, 1, 0, distance)
    assert distance.isfinite().all()
    torch.testing.assert_close(distance, expected, rtol=1e-3, atol=1e-3)
