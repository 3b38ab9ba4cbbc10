"""The accuracy that every op is held to, in one place."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_accurate(actual: Tensor, reference: Tensor, oracle: Tensor) -> None:
    """Error of an op against at most twice that of the reference in the same working precision.

    ``oracle`` is the reference in float64; 8 eps of its largest value are granted on top.
    """
    assert actual.shape == oracle.shape
    assert actual.dtype == reference.dtype
    if oracle.numel() == 0:
        return
    assert torch.equal(actual.isnan(), oracle.isnan())
    truth = oracle.double().nan_to_num(0.0)
    error = (actual.double().nan_to_num(0.0) - truth).abs().max()
    allowed = 2 * (reference.double().nan_to_num(0.0) - truth).abs().max()
    allowed += 8 * torch.finfo(actual.dtype).eps * truth.abs().max()
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"
