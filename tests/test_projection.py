"""Axes to which embeddings are reduced."""

import pytest
import torch

from npad.features.projection import principal_axes


def test_principal_axes_are_those_of_the_covariance() -> None:
    x = torch.randn(400, 6) * torch.tensor([1.0, 5.0, 0.1, 3.0, 0.5, 2.0]) + 7
    axes = principal_axes((part.reshape(-1, 10, 6) for part in x.split(100)), 3)
    _, _, expected = torch.pca_lowrank(x.double(), q=6, niter=20)
    cosines = (axes.double() * expected[:, :3]).sum(0).abs()
    torch.testing.assert_close(cosines, torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-6)


def test_no_embeddings() -> None:
    with pytest.raises(ValueError, match="no embeddings"):
        principal_axes([], 3)
