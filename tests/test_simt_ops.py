"""npad/ops/_cuda.py on the CPU emulator: what it hands to each launcher, in which order."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from accuracy import assert_accurate
from op_cases import LAUNCHES, OPS, off_by_one, room_of
from simt_device import load
from simt_wrappers import use
from torch import Tensor

from npad import check
from npad.check.cases import CASES, Arguments, on, tensors


def through_the_wrappers(
    library: str,
    name: str,
    arguments: Arguments,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An op through the wrappers for CUDA: its launches, and its results."""
    launched = []

    def note(op: str, arguments: tuple[Any, ...]) -> None:
        launched.append(op)

    levels = [room_of(a) for a in arguments if name == "embed" and isinstance(a, Tensor)]
    use(load(library), monkeypatch.setattr, note, reached=levels)
    op, reference, _ = OPS[name]
    actual = tensors(op(*arguments))
    assert launched == LAUNCHES[name]
    working = tensors(reference(*arguments))
    oracle = tensors(reference(*on("cpu", arguments, torch.float64)))
    for a, w, o in zip(actual, working, oracle, strict=True):
        assert_accurate(a, w, o)


@pytest.mark.parametrize("library", ["simt_fast", "simt_fma"])
@pytest.mark.parametrize("channels", [7, 40])
@pytest.mark.parametrize("name", OPS)
def test_launchers_get_their_arguments(
    name: str, channels: int, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    through_the_wrappers(library, name, OPS[name][2](channels), monkeypatch)


@pytest.mark.parametrize("name", OPS)
def test_odd_addresses(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No vector is loaded from one: the wrapper copies, or the kernel takes element by element."""
    through_the_wrappers("simt_checked", name, off_by_one(OPS[name][2](8)), monkeypatch)


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
