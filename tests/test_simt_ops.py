"""npad/ops/_cuda.py on the CPU emulator: what it hands to each launcher, in which order."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from accuracy import assert_accurate
from op_cases import OPS
from simt_device import load
from simt_wrappers import use

from npad import check
from npad.check.cases import CASES, on, tensors


@pytest.mark.parametrize("channels", [7, 40])
@pytest.mark.parametrize("name", OPS)
def test_launchers_get_their_arguments(
    name: str, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = []

    def note(op: str, arguments: tuple[Any, ...]) -> None:
        launched.append(op)

    use(load("simt_fast"), monkeypatch.setattr, note)
    op, reference, make = OPS[name]
    arguments = make(channels)
    actual = tensors(op(*arguments))
    assert launched == [name]
    working = tensors(reference(*arguments))
    oracle = tensors(reference(*on("cpu", arguments, torch.float64)))
    for a, w, o in zip(actual, working, oracle, strict=True):
        assert_accurate(a, w, o)


@pytest.mark.parametrize("name", OPS)
def test_every_variant_is_right(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use(load("simt_fast"), monkeypatch.setattr)
    monkeypatch.setattr(check, "SIZES", ())
    monkeypatch.setattr(check, "FEW_SIZES", (13,))
    case = CASES[name]
    monkeypatch.setitem(CASES, name, case._replace(large=partial(case.make, 20)))
    found = check.examine(name, torch.device("cpu"))
    assert (found.op, found.fault) == (name, None)
    assert found.error_over_bound is not None
