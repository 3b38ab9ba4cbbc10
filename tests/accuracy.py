"""The accuracy that every op is held to; `npad.check.accuracy` knows the bound."""

from __future__ import annotations

from torch import Tensor

from npad.check.accuracy import error_over_bound


def assert_accurate(actual: Tensor, reference: Tensor, oracle: Tensor) -> None:
    """Error of an op against at most twice that of the reference in the same working precision.

    ``oracle`` is the reference in float64; 8 eps of its largest value are granted on top. Integers are
    the same.
    """
    found = error_over_bound(actual, reference, oracle)
    assert found <= 1, f"the error is {found:.3g} times what is allowed"
