"""Axes to which embeddings are reduced."""

import pytest
import torch

from npad.features.projection import leading_axes, principal_axes


def test_principal_axes_are_those_of_the_covariance() -> None:
    x = torch.randn(400, 6) * torch.tensor([1.0, 5.0, 0.1, 3.0, 0.5, 2.0]) + 7
    axes = principal_axes((part.reshape(-1, 10, 6) for part in x.split(100)), 3)
    _, _, expected = torch.pca_lowrank(x.double(), q=6, niter=20)
    cosines = (axes.double() * expected[:, :3]).sum(0).abs()
    torch.testing.assert_close(cosines, torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("share", "most", "expected"),
    [
        (0.5, 100, 8),  # two are enough, and rows come in eights
        (0.999, 100, 16),
        (0.999, 13, 13),
        (0.99999, 16, 16),
        (0.99999, 17, None),  # it is not worth the product
        (0.99999, 100, None),
        (1.0, 24, None),
    ],
)
def test_leading_axes_hold_a_share_of_the_variance(
    share: float, most: int, expected: int | None
) -> None:
    """Variances 2 ** -i along the columns of a rotation."""
    rotation, _ = torch.linalg.qr(torch.randn(24, 24, dtype=torch.float64))
    variances = 2.0 ** -torch.arange(24, dtype=torch.float64)
    axes = leading_axes((rotation * variances) @ rotation.mT, share, most)
    if expected is None:
        assert axes is None
        return
    assert axes is not None
    cosines = (axes.double() * rotation[:, :expected]).sum(0).abs()
    torch.testing.assert_close(
        cosines, torch.ones(expected, dtype=torch.float64), atol=1e-5, rtol=0
    )


def test_a_channel_that_never_varies_is_left_out() -> None:
    covariance = torch.diag(torch.tensor([0.0] * 9 + [3.0] * 7, dtype=torch.float64))
    axes = leading_axes(covariance, 0.999, 100)
    assert axes is not None
    assert axes.shape == (16, 8)
    assert axes[9:].square().sum() == pytest.approx(7)


def test_no_embeddings() -> None:
    with pytest.raises(ValueError, match="no embeddings"):
        principal_axes([], 3)
