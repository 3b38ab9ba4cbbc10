"""inverse_cholesky: covariances to packed inverse factors."""

import pytest
import torch
from accuracy import assert_accurate
from fitted import covariances, whitening_error

from npad import ops
from npad.ops import reference
from npad.ops.packed import store


@pytest.mark.parametrize("channels", [1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 40, 63, 65, 100, 203])
def test_against_reference(isa: str, channels: int) -> None:
    covariance = covariances(3, channels)
    factor, info = ops.inverse_cholesky(covariance)
    working, _ = reference.inverse_cholesky(covariance, torch.float32)
    oracle, _ = reference.inverse_cholesky(covariance.double(), torch.float64)
    assert_accurate(factor, working, oracle)
    assert info.dtype == torch.int32
    assert not info.any()


@pytest.mark.parametrize("channels", [5, 100])
def test_whitens_the_covariance(channels: int) -> None:
    covariance = covariances(2, channels)
    assert whitening_error(ops.inverse_cholesky(covariance)[0], covariance) < 1e-3


def test_whitens_an_ill_conditioned_covariance_as_the_reference_does(isa: str) -> None:
    basis = torch.linalg.qr(torch.randn(8, 64, 64).double()).Q
    covariance = ((basis * torch.logspace(-3, 2, 64).double()) @ basis.mT).float()
    covariance = (covariance + covariance.mT) / 2
    factor, info = ops.inverse_cholesky(covariance)
    assert not info.any()
    working, _ = reference.inverse_cholesky(covariance, torch.float32)
    assert whitening_error(factor, covariance) < 2 * whitening_error(working, covariance)


@pytest.mark.parametrize("bad", [0.0, -1.0, torch.nan, torch.inf])
@pytest.mark.parametrize("minor", [1, 5, 30, 37])
def test_names_the_minor_that_is_not_positive_definite(isa: str, minor: int, bad: float) -> None:
    covariance = torch.eye(37).repeat(3, 1, 1)
    covariance[1, minor - 1, minor - 1] = bad
    factor, info = ops.inverse_cholesky(covariance)
    assert info.tolist() == [0, minor, 0]
    assert factor[1].isnan().all()
    expected = ops.pack_factor(torch.eye(37)[None])[0]
    assert torch.equal(factor[0], expected)
    assert torch.equal(factor[2], expected)
    if bad <= 0:
        torch.testing.assert_close(
            reference.inverse_cholesky(covariance, torch.float32), (factor, info), equal_nan=True
        )


@pytest.mark.parametrize("dtype", ops.FACTOR_DTYPES)
def test_storage_types(dtype: torch.dtype) -> None:
    covariance = covariances(2, 19)
    factor, _ = ops.inverse_cholesky(covariance, dtype)
    assert torch.equal(factor, store(ops.inverse_cholesky(covariance)[0], 19, dtype))


def test_threads_do_not_change_a_bit() -> None:
    covariance = covariances(7, 45)
    torch.set_num_threads(1)
    one, _ = ops.inverse_cholesky(covariance)
    torch.set_num_threads(3)
    assert torch.equal(ops.inverse_cholesky(covariance)[0], one)


def test_empty_and_strided() -> None:
    factor, info = ops.inverse_cholesky(torch.zeros(0, 9, 9))
    assert factor.shape == (0, ops.packed_size(9))
    assert info.shape == (0,)
    covariance = covariances(4, 9)
    strided = torch.stack([covariance, covariance], 1)[:, 0]
    assert torch.equal(ops.inverse_cholesky(strided)[0], ops.inverse_cholesky(covariance)[0])


def test_opcheck() -> None:
    torch.library.opcheck(
        torch.ops.npad.inverse_cholesky.default, (covariances(3, 9), torch.float16)
    )


def test_rejects() -> None:
    with pytest.raises(TypeError, match="inverse_cholesky: covariance must be float32"):
        ops.inverse_cholesky(torch.eye(3).double()[None])
    with pytest.raises(TypeError, match="dtype must be float32, float16, bfloat16 or int8"):
        ops.inverse_cholesky(torch.eye(3)[None], torch.float64)
    with pytest.raises(ValueError, match=r"covariance must have shape \(R, C, C\), got \(3, 4\)"):
        ops.inverse_cholesky(torch.zeros(3, 4))
