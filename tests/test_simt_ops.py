"""npad/ops/_cuda.py on the CPU emulator: what it hands to each launcher, in which order."""

from __future__ import annotations

import ctypes
from functools import partial
from typing import Any

import pytest
import torch
from accuracy import assert_accurate
from op_cases import OPS, on, tensors
from simt_device import Simt, load
from torch import Tensor

from npad import ops
from npad.ops import _cuda


class Sizes:
    """Functions of sizes alone, as the extension has them."""

    def __init__(self, simt: Simt) -> None:
        self._simt = simt

    def __getattr__(self, name: str) -> Any:
        return partial(self._simt.number, name)


def in_c(argument: Any) -> Any:
    if isinstance(argument, torch.dtype):
        return ctypes.c_int(ops.FACTOR_DTYPES.index(argument))  # in the order of DataType
    if isinstance(argument, bool):
        return ctypes.c_bool(argument)
    return ctypes.c_double(argument) if isinstance(argument, float) else argument


@pytest.mark.parametrize("channels", [7, 40])
@pytest.mark.parametrize("name", OPS)
def test_launchers_get_their_arguments(
    name: str, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    simt, launched = load("simt_fast"), []

    def run(op: str, x: Tensor, *arguments: Any) -> None:
        launched.append(op)
        simt.once(op, *map(in_c, arguments))

    monkeypatch.setattr(_cuda, "cuda", Sizes(simt))
    monkeypatch.setattr(_cuda, "_run", run)
    monkeypatch.setattr(torch.ops, "npad", _cuda)  # in place of the dispatcher, which sees the CPU
    op, reference, make = OPS[name]
    arguments = make(channels)
    actual = tensors(op(*arguments))
    assert launched == [name]
    working = tensors(reference(*arguments))
    oracle = tensors(reference(*on("cpu", arguments, torch.float64)))
    for a, w, o in zip(actual, working, oracle, strict=True):
        if a.is_floating_point():
            assert_accurate(a, w, o)
        else:
            assert torch.equal(a, o)
