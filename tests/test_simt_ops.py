"""npad/ops/_cuda.py on the CPU emulator: what it hands to each launcher, in which order."""

from __future__ import annotations

import ctypes
from functools import partial
from typing import Any

import pytest
import torch
from accuracy import assert_accurate
from op_cases import OPS, Arguments, off_by_one, on, room_of, tensors
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


def check(
    library: str,
    name: str,
    arguments: Arguments,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An op through the wrappers for CUDA: one launch, of the op's own launcher, and its results."""
    simt, launched = load(library), []

    def run(op: str, x: Tensor, *passed: Any) -> None:
        launched.append(op)
        levels = [room_of(a) for a in arguments if op == "embed" and isinstance(a, Tensor)]
        simt.once(op, *map(in_c, passed), reached=levels)

    monkeypatch.setattr(_cuda, "cuda", Sizes(simt))
    monkeypatch.setattr(_cuda, "_run", run)
    monkeypatch.setattr(torch.ops, "npad", _cuda)  # in place of the dispatcher, which sees the CPU
    op, reference, _ = OPS[name]
    actual = tensors(op(*arguments))
    assert launched == [name]
    working = tensors(reference(*arguments))
    oracle = tensors(reference(*on("cpu", arguments, torch.float64)))
    for a, w, o in zip(actual, working, oracle, strict=True):
        if a.is_floating_point():
            assert_accurate(a, w, o)
        else:
            assert torch.equal(a, o)


@pytest.mark.parametrize("library", ["simt_fast", "simt_fma"])
@pytest.mark.parametrize("channels", [7, 40])
@pytest.mark.parametrize("name", OPS)
def test_launchers_get_their_arguments(
    name: str, channels: int, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(library, name, OPS[name][2](channels), monkeypatch)


@pytest.mark.parametrize("name", OPS)
def test_odd_addresses(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No vector is loaded from one: the wrapper copies, or the kernel takes element by element."""
    check("simt_checked", name, off_by_one(OPS[name][2](8)), monkeypatch)
