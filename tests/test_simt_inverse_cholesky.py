"""csrc/cuda/inverse_cholesky.cu on the CPU emulator."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_accurate
from fitted import covariances, whitening_error
from simt_device import Simt, load
from torch import Tensor

from npad import ops
from npad.ops import reference

TYPES = (torch.float32, torch.float16, torch.bfloat16)  # in the order of DataType


@pytest.fixture(params=["simt_fast", "simt_fma", "simt_checked", "simt_sm75"])
def simt(request: pytest.FixtureRequest) -> Simt:
    return load(request.param)


def run(
    simt: Simt, covariance: Tensor, dtype: torch.dtype = torch.float32, processors: int = 3
) -> tuple[Tensor, Tensor]:
    count, channels, _ = covariance.shape
    packed = torch.zeros(count, ops.packed_size(channels), dtype=dtype)
    info = torch.full((count,), -1, dtype=torch.int32)
    workspace = simt.workspace("inverse_cholesky", count, channels)
    simt(
        "inverse_cholesky", covariance, count, channels, workspace, packed, TYPES.index(dtype),
        info, processors=processors,
    )  # fmt: skip
    return packed, info


def assert_as_reference(simt: Simt, covariance: Tensor) -> None:
    factor, info = run(simt, covariance)
    working, _ = reference.inverse_cholesky(covariance, torch.float32)
    oracle, failed = reference.inverse_cholesky(covariance.double(), torch.float64)
    assert not failed.any()
    assert info.tolist() == [0] * len(covariance)
    for w, r, o in zip(factor, working, oracle, strict=True):
        assert_accurate(w, r, o)


@pytest.mark.parametrize("channels", [1, 7, 8, 31, 33, 64, 65, 100, 129])
def test_against_reference(simt: Simt, channels: int) -> None:
    assert_as_reference(simt, covariances(2, channels))


def test_more_tiles_than_slices_in_flight() -> None:
    assert_as_reference(load("simt_fast"), covariances(1, 333))


@pytest.mark.parametrize("dtype", TYPES[1:])
@pytest.mark.parametrize("channels", [1, 7, 31, 100])
def test_storage_types(simt: Simt, channels: int, dtype: torch.dtype) -> None:
    covariance = covariances(2, channels)
    assert torch.equal(run(simt, covariance, dtype)[0], run(simt, covariance)[0].to(dtype))


def test_a_block_takes_several_matrices_and_changes_no_bit() -> None:
    simt = load("simt_fast")
    covariance = covariances(9, 70)
    covariance[1] = -covariance[1]
    covariance[3, 66, 66] = torch.nan
    few, info = run(simt, covariance, processors=1)  # two blocks
    many, _ = run(simt, covariance, processors=5)
    assert info.tolist() == [0, 1, 0, 67, 0, 0, 0, 0, 0]
    torch.testing.assert_close(few, many, rtol=0, atol=0, equal_nan=True)
    for m in (0, 2, 8):
        assert torch.equal(run(simt, covariance[m : m + 1])[0][0], few[m])


def test_exact_where_every_number_is() -> None:
    """A diagonal of powers of four."""
    scale = torch.randint(-12, 13, (90,))
    factor, _ = run(load("simt_fast"), torch.diag(4.0**scale)[None])
    assert torch.equal(reference.unpack(factor, 90)[0], torch.diag(2.0**-scale))


@pytest.mark.parametrize("scale", [1e-4, 1e4, 1e-15, 1e15])
def test_badly_scaled_values(simt: Simt, scale: float) -> None:
    assert_as_reference(simt, scale**2 * covariances(1, 70))


def test_scaling_channels_by_powers_of_two_changes_no_bit() -> None:
    simt = load("simt_fast")
    covariance, scale = covariances(1, 100), 2.0 ** torch.randint(-12, 13, (100,))
    expected = reference.unpack(run(simt, covariance)[0], 100) / scale
    factor, _ = run(simt, scale[:, None] * covariance * scale)
    assert torch.equal(reference.unpack(factor, 100), expected)


@pytest.mark.parametrize("channels", [60, 150])
def test_nearly_singular(channels: int) -> None:
    """Condition 1e5."""
    basis = torch.linalg.qr(torch.randn(2, channels, channels).double()).Q
    covariance = ((basis * torch.logspace(-3, 2, channels).double()) @ basis.mT).float()
    covariance = (covariance + covariance.mT) / 2
    factor, info = run(load("simt_fast"), covariance)
    assert not info.any()
    working, _ = reference.inverse_cholesky(covariance, torch.float32)
    oracle, _ = reference.inverse_cholesky(covariance.double(), torch.float64)
    assert_accurate(factor, working, oracle)
    error = [whitening_error(w, covariance) for w in (factor, working)]
    assert error[0] < 2 * error[1]


@pytest.mark.parametrize("bad", [0.0, -1.0, torch.nan, torch.inf])
@pytest.mark.parametrize("minor", [1, 37, 38, 100])
def test_names_the_minor_that_is_not_positive_definite(minor: int, bad: float) -> None:
    covariance = torch.eye(101).repeat(3, 1, 1)
    covariance[1, minor - 1, minor - 1] = bad
    factor, info = run(load("simt_fast"), covariance)
    assert info.tolist() == [0, minor, 0]
    assert factor[1].isnan().all()
    expected = reference.pack(torch.eye(101)[None])[0]
    assert torch.equal(factor[0], expected)
    assert torch.equal(factor[2], expected)


def test_names_the_same_minor_as_lapack(simt: Simt) -> None:
    """Indefinite matrices, and NaN off the diagonal."""
    shift = torch.tensor([0.2, 0.5, 2.0, 0.0])[:, None, None]
    covariance = covariances(4, 80) - shift * torch.eye(80)
    covariance[3, 70, 20] = covariance[3, 20, 70] = torch.nan
    _, expected = reference.inverse_cholesky(covariance, torch.float32)
    assert expected.all()
    factor, info = run(simt, covariance, torch.float16)
    assert torch.equal(info, expected)
    assert factor.isnan().all()


def test_reads_one_triangle() -> None:
    covariance = covariances(2, 100)
    expected, _ = run(load("simt_fast"), covariance)
    row, column = torch.tril_indices(100, 100, -1)
    covariance[:, row, column] = torch.nan
    assert torch.equal(run(load("simt_fast"), covariance)[0], expected)


@pytest.mark.parametrize("dtype", TYPES)
def test_no_matrices(simt: Simt, dtype: torch.dtype) -> None:
    factor, info = run(simt, torch.empty(0, 5, 5), dtype)
    assert factor.shape == (0, ops.packed_size(5))
    assert info.shape == (0,)
