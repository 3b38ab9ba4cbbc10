"""Orthonormal axes: random ones, and about the leading ones of some rows."""

import pytest
import torch

from npad.ops.axes import as_rows, leading_axes, random_axes


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_random_axes_are_orthonormal_and_seeded(dtype: torch.dtype, most: float) -> None:
    first, again, other = (
        random_axes(20, 7, torch.Generator().manual_seed(seed), dtype) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    torch.testing.assert_close(first.T @ first, torch.eye(7, dtype=dtype), rtol=0, atol=most)


def test_random_axes_are_those_of_the_generators_device() -> None:
    """Also where tensors are made elsewhere unless told."""
    axes = random_axes(5, 2, torch.Generator())
    with torch.device("meta"):
        assert torch.equal(random_axes(5, 2, torch.Generator()), axes)


def test_leading_axes() -> None:
    """Of rows along a grid, whose columns differ more than anything else."""
    columns = 10 * torch.randn(32, 1, 100)
    rows = columns.transpose(0, 1) + torch.randn(512, 32, 100) * torch.arange(1, 101) ** -0.5
    found = leading_axes(rows.flatten(0, 1), 40)
    assert found is not None
    mean, axes = found
    assert mean.shape == (100,)
    torch.testing.assert_close(axes.T @ axes, torch.eye(40).double(), rtol=0, atol=1e-12)
    deviation = rows.flatten(0, 1).double() - mean
    found_variance = (deviation @ axes).square().sum(0)
    most = torch.linalg.eigvalsh(deviation.T @ deviation).flip(0)
    for k in (1, 8, 31, 40):
        assert found_variance[:k].sum() > 0.97 * most[:k].sum()
    assert leading_axes(1e15 * rows[0], 40) is None


def test_leading_axes_of_more_than_there_are() -> None:
    found = leading_axes(torch.randn(50, 6), 62)
    assert found is not None
    assert found[1].shape == (6, 6)


def test_as_rows() -> None:
    axes = torch.randn(5, 2).double()
    rows = as_rows(axes, 4, like=torch.empty(0), first=1)
    assert rows.is_contiguous()
    assert torch.equal(rows[1:3], axes.T.float())
    assert (rows[[0, 3]] == 0).all()
