"""Whether `npad check` finds what is wrong, and what it says."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from command_line import fail, npad, succeed
from torch import Tensor

import npad as npad_package
from npad import check
from npad.check import __main__ as child
from npad.check.accuracy import WrongError, error_over_bound
from npad.check.cases import CASES, tensors
from npad.ops import _cuda, _extension, trust
from npad.ops.trust import children
from npad.ops.trust.findings import Finding

CPU = torch.device("cpu")


# --- the bound ---


def test_the_bound_is_twice_the_error_of_the_reference_and_8_eps() -> None:
    oracle = torch.tensor([1.0, -2.0], dtype=torch.float64)
    working = torch.tensor([1.0, -2.0 + 2**-10])
    allowed = 2 * 2**-10 + 8 * torch.finfo(torch.float32).eps * 2
    for share in (0.0, 0.5, 2.0):
        actual = (oracle + torch.tensor([share * allowed, 0.0])).float()
        assert error_over_bound(actual, working, oracle) == pytest.approx(share, abs=1e-3)


def test_nothing_is_allowed_where_all_is_zero() -> None:
    zero = torch.zeros(3)
    assert error_over_bound(zero, zero, zero.double()) == 0
    assert error_over_bound(zero + 1e-30, zero, zero.double()) == float("inf")
    assert error_over_bound(zero[:0], zero[:0], zero[:0].double()) == 0


def test_infinity_is_not_right() -> None:
    one = torch.ones(2)
    assert not error_over_bound(one / 0, one, one.double()) <= 1


@pytest.mark.parametrize(
    ("actual", "text"),
    [
        (torch.ones(3), r"its shape is \(3,\), not \(2,\)"),
        (torch.ones(2, dtype=torch.float16), "its dtype is torch.float16, not torch.float32"),
        (torch.tensor([1.0, torch.nan]), "NaN where the reference has none"),
    ],
)
def test_what_no_rounding_explains(actual: Tensor, text: str) -> None:
    one = torch.ones(2)
    with pytest.raises(WrongError, match=text):
        error_over_bound(actual, one, one.double())


def test_integers_are_the_same() -> None:
    one = torch.ones(2, dtype=torch.int64)
    assert error_over_bound(one, one, one) == 0
    with pytest.raises(WrongError, match="1 of 2 integers are not those of the reference"):
        error_over_bound(torch.tensor([1, 2]), one, one)


# --- one op ---


def off(result: Tensor) -> None:
    result.view(-1)[-1] *= 1.01


def undefined(result: Tensor) -> None:
    result.view(-1)[0] = torch.nan


def random(result: Tensor) -> None:
    result.view(-1)[-1] *= 1 + 1e-7 * torch.rand(()).round()


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (off, r"^size 7: the error is \S+ times what is allowed$"),
        (undefined, "^size 7: NaN where the reference has none"),
        (random, "^size 7: a second run gives other bits$"),
    ],
)
@pytest.mark.parametrize("name", CASES)
def test_a_wrong_kernel_is_found(
    name: str, spoil: Callable[[Tensor], None], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]

    def op(*arguments: object) -> list[Tensor]:
        results = tensors(case.op(*arguments))
        spoil(next(t for t in results if t.is_floating_point()))
        return results

    monkeypatch.setitem(CASES, name, case._replace(op=op))
    monkeypatch.setattr(check, "SIZES", (7,) * 9)  # of which one at least is not as the others
    before = torch.get_rng_state()
    found = check.examine(name, CPU)
    assert found.fault is not None
    assert re.search(text, found.fault)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_large_shape_is_timed_beside_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "SIZES", ())
    monkeypatch.setattr(check, "FEW_SIZES", ())
    found = check.examine("resize_maps", CPU, check.Clock(CPU))
    assert found.fault is None
    assert found.milliseconds is not None
    assert found.of_bandwidth is not None
    assert 0.01 < found.milliseconds < 1e4
    assert 0.001 < found.of_bandwidth < 20


def test_on_a_gpu_an_op_is_queued_behind_the_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the time to launch it is not measured. Nothing waits before all is queued."""
    queue: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.place = len(queue)
            queue.append("event")

        def synchronize(self) -> None:
            queue.append("wait")

        def elapsed_time(self, end: Event) -> float:
            return 1e3 * (end.place - self.place)

    clock = check.Clock(CPU)
    clock._device = torch.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(clock, "_copy", lambda: queue.append("copy"))
    seconds = clock._pair(lambda: queue.extend(["op", "op"]))
    assert queue == ["event", "copy", "event", "op", "op", "event", "wait"]
    assert seconds == (2.0, 3.0)


# --- child processes ---


def test_a_child_checks_every_op() -> None:
    found = list(children.findings("cpu", full=False))
    assert [f.op for f in found] == list(CASES)
    assert [f.fault for f in found] == [None] * len(CASES)


def test_a_device_that_a_child_does_not_see() -> None:
    with pytest.raises(children.UncheckedError, match="does not see the GPU none-of-these"):
        list(children.findings("none-of-these", full=False))


def test_a_gpu_that_another_process_has_to_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It ends before the first op, of which that says nothing."""

    def busy(*_: object, **__: object) -> Tensor:
        raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda i: SimpleNamespace(uuid=f"uuid-{i}")
    )
    monkeypatch.setattr(torch.cuda, "set_device", lambda i: None)
    monkeypatch.setattr(torch, "zeros", busy)
    with pytest.raises(RuntimeError, match="busy or unavailable"):
        child.main("uuid-0", "quick", "")
    assert capsys.readouterr().out == ""


def test_a_child_imports_what_this_process_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not what lies in the current folder; and it does not stop at a warning."""
    (tmp_path / "torch.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONWARNINGS", "error")
    program = "import os, npad, torch, warnings; print(npad.__file__, os.environ['NPAD_CHECK'])"
    out, ended = children._run([sys.executable, "-c", f"{program}; warnings.warn('of no use')"])
    assert (out.split(), ended) == ([npad_package.__file__, "0"], "")


def test_a_program_without_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    with pytest.raises(
        children.UncheckedError, match="/nowhere/python could not be started: No such"
    ):
        list(children.findings("cpu", full=False))
    monkeypatch.setattr("sys.frozen", True, raising=False)
    with pytest.raises(
        children.UncheckedError, match="no Python interpreter that could be started"
    ):
        list(children.findings("cpu", full=False))


# --- the command ---


FOUND = [Finding("embed", None, 0.105, 40.123, 0.3), Finding("mahalanobis", None, 0.0, 9.0, 1.2)]
WRONG = Finding("anomaly_map", "size 7: the error is 12 times what is allowed", 12.0)


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[Finding]:
    findings = list(FOUND)
    monkeypatch.setattr(trust, "check", lambda device: findings)
    return findings


def test_a_table_and_a_verdict(found: list[Finding]) -> None:
    assert succeed("check").out.splitlines() == [
        "op\terror_over_bound\tmilliseconds\tof_bandwidth\tverdict",
        "embed\t0.105\t40.1\t0.3\tright",
        "mahalanobis\t0\t9\t1.2\tright",
        "cpu: right",
    ]


def test_a_wrong_kernel_fails_the_command(found: list[Finding]) -> None:
    found.append(WRONG)
    done = fail(1, "check", says=["kernels are wrong on cpu: anomaly_map; please report it"])
    assert done.out.splitlines()[-2:] == [
        "anomaly_map\t12\t–\t–\tsize 7: the error is 12 times what is allowed",
        "cpu: wrong: anomaly_map",
    ]


def test_json_holds_what_a_report_needs(found: list[Finding]) -> None:
    assert json.loads(succeed("check", "--json").out)["verdict"] == "right"
    found.append(WRONG)
    done = npad("check", "--json")
    assert done.code == 1
    told = json.loads(done.out)
    assert (told["device"], told["verdict"]) == ("cpu", "wrong")
    assert [op["fault"] for op in told["ops"]] == [None, None, WRONG.fault]
    assert told["ops"][0]["milliseconds"] == 40.123
    assert told["info"]["kernels"]["isa"] == _extension.core.isa()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs that there is no GPU")
def test_a_device_that_is_not_there() -> None:
    fail(2, "check", "--device", "cuda:0", says=["--device 'cuda:0' cannot be used here"])
    fail(2, "check", "--device", "meta", says=["--device 'meta' cannot be used here"])
    fail(2, "check", "--device", "gpu", says=["--device must be a torch device such as"])


@pytest.mark.parametrize(
    ("device", "text"),
    [
        ("cpu", "the PyTorch reference runs on cpu"),
        ("cuda:0", "the PyTorch reference runs on cuda:0"),
        ("xpu:0", "--device 'xpu:0' has no kernels that could be checked"),
    ],
)
def test_nothing_to_check(device: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("npad.devices.resolve", torch.device)
    monkeypatch.setattr(_extension, "core", None)
    monkeypatch.setattr(_cuda, "registered", False)
    fail(1, "check", "--device", device, says=[text])


@pytest.mark.cuda
def test_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert succeed("check", "--device", "cuda").out.splitlines()[-1] == "cuda:0: right"
    (verdict,) = (tmp_path / "npad").iterdir()
    assert json.loads(verdict.read_text())["faults"] == {}
