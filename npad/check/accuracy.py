"""The accuracy that every kernel is held to, by the tests and by `npad check`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["WrongError", "error_over_bound"]


class WrongError(ValueError):
    """A result that no rounding explains."""


def error_over_bound(actual: Tensor, working: Tensor, oracle: Tensor) -> float:
    """Error of a result as a share of what is allowed; up to 1 it is right, and NaN is not.

    Parameters
    ----------
    actual : result of a kernel, any shape and dtype
    working : that of the reference, from the same arguments
    oracle : that of the reference in float64

    Returns
    -------
    Largest error over twice that of the reference and 8 eps of the largest value; 0 for integers.

    Raises
    ------
    WrongError
        Another shape or dtype, NaN in other places, other integers.
    """
    if actual.shape != oracle.shape:
        raise WrongError(f"its shape is {tuple(actual.shape)}, not {tuple(oracle.shape)}")
    if actual.dtype != working.dtype:
        raise WrongError(f"its dtype is {actual.dtype}, not {working.dtype}")
    if not actual.is_floating_point():
        differ = int((actual != oracle).sum())
        if differ:
            raise WrongError(
                f"{differ} of {actual.numel()} integers are not those of the reference"
            )
        return 0.0
    if oracle.numel() == 0:
        return 0.0
    if not torch.equal(actual.isnan(), oracle.isnan()):
        raise WrongError("NaN where the reference has none, or none where it has")
    truth = oracle.double().nan_to_num(0.0)
    error = float((actual.double().nan_to_num(0.0) - truth).abs().max())
    allowed = 2 * float((working.double().nan_to_num(0.0) - truth).abs().max())
    allowed += 8 * torch.finfo(actual.dtype).eps * float(truth.abs().max())
    if error == 0:
        return 0.0
    return error / allowed if allowed else math.inf
