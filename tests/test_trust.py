"""On which GPU which kernels may run; a fake GPU, whose kernels run on the emulator."""

from __future__ import annotations

import json
import re
import sys
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from op_cases import LAUNCHES
from simt_device import load
from simt_wrappers import use

from npad import ops
from npad.atomic_file import replacing
from npad.check.cases import CASES, tensors
from npad.ops import _cuda, reference, trust
from npad.ops.trust import children, verdicts
from npad.ops.trust.architectures import covers
from npad.ops.trust.findings import Finding

CHILD = str(Path(__file__).with_name("planted_child.py"))


# --- architectures ---


@pytest.mark.parametrize(
    ("architectures", "runs", "does_not"),
    [
        ("90", [(9, 0), (10, 0), (12, 1)], [(8, 9), (7, 5)]),
        ("86-real", [(8, 6), (8, 9)], [(8, 0), (9, 0), (7, 5)]),
        ("80-virtual", [(8, 0), (8, 6), (12, 0)], [(7, 5)]),
        ("90a", [(9, 0)], [(10, 0), (8, 9)]),
        ("90a-real", [(9, 0)], [(9, 1)]),
        ("100f", [(10, 0), (10, 3)], [(12, 0), (9, 0)]),
        ("75-real,80-real,120", [(7, 5), (8, 7), (12, 0), (13, 0)], [(9, 0), (7, 0), (11, 0)]),
        ("native", [(5, 0)], []),
    ],
)
def test_what_a_build_runs_on(
    architectures: str, runs: list[tuple[int, int]], does_not: list[tuple[int, int]]
) -> None:
    assert [c for c in [*runs, *does_not] if covers(architectures, c)] == runs


def test_every_gpu_from_turing_on_has_code_in_a_release() -> None:
    """What cmake/architectures.cmake lists; an nvcc before 12.8 knows it as far as 90."""
    text = (Path(__file__).parents[1] / "cmake/architectures.cmake").read_text()
    (listed,) = re.findall(r"set\(NPAD_RELEASE_ARCHITECTURES ([^)]+)\)", text)
    names = listed.split()
    capabilities = [(7, 5), *((major, minor) for major in range(8, 14) for minor in range(10))]
    for known in (names, names[: names.index("90") + 1]):
        assert all(covers(",".join(known), capability) for capability in capabilities)
        assert not covers(",".join(known), (7, 0))


# --- a fake GPU ---


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> trust.Gpu:
    """In place of every GPU, which no part of the process has used yet; checks are asked for."""
    fake = trust.Gpu(0, "Fake 9000", (9, 0), "uuid")
    monkeypatch.setattr(trust.Gpu, "of", lambda index: fake)
    monkeypatch.setattr(trust, "_failed", {})
    monkeypatch.setattr(
        trust, "cuda", SimpleNamespace(architectures="90", driver_version=lambda: 13000)
    )
    monkeypatch.setenv("NPAD_CHECK", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return fake


class Checks:
    """In place of the child processes: counts them, and finds what it is told."""

    def __init__(self, *findings: Finding, error: str = "") -> None:
        self.findings, self.error = findings, error
        self.devices: list[str] = []

    def __call__(self, device: str, *, full: bool) -> Iterator[Finding]:
        self.devices.append(device)
        if self.error:
            raise children.UncheckedError(self.error)
        yield from self.findings


RIGHT, WRONG = Finding("embed", None, 0.1), Finding("mahalanobis", "size 7: it is off", 3.0)


def checks(monkeypatch: pytest.MonkeyPatch, *findings: Finding, error: str = "") -> Checks:
    made = Checks(*findings, error=error)
    monkeypatch.setattr(children, "findings", made)
    return made


def test_a_right_gpu_is_checked_once_and_silently(
    gpu: trust.Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = checks(monkeypatch, RIGHT)
    assert [trust.failed(0) for _ in range(3)] == [frozenset()] * 3
    assert made.devices == ["uuid"]
    trust._failed.clear()  # as in the next process
    assert trust.failed(0) == frozenset()
    assert made.devices == ["uuid"]


def test_a_failure_is_told_once_in_each_process(
    gpu: trust.Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = checks(monkeypatch, RIGHT, WRONG)
    monkeypatch.setattr(trust, "_driver", lambda: "580.1")
    for _ in range(2):
        trust._failed.clear()
        with pytest.warns(RuntimeWarning) as caught:
            assert [trust.failed(0) for _ in range(2)] == [frozenset({"mahalanobis"})] * 2
        (warning,) = caught
        assert str(warning.message) == (
            "npad: kernels failed their check on cuda:0 (Fake 9000), driver 580.1: mahalanobis "
            "(size 7: it is off). The slower PyTorch reference runs in their place. Please report it "
            "with what `npad check --device cuda:0` --json prints; after a change to the machine, "
            "`npad check --device cuda:0` checks again"
        )
    assert len(made.devices) == 1


@pytest.mark.parametrize("change", ["version", "build", "name", "driver"])
def test_another_build_gpu_or_driver_is_checked_anew(
    change: str, gpu: trust.Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = checks(monkeypatch, RIGHT)
    trust.failed(0)
    trust._failed.clear()
    if change == "version":
        monkeypatch.setattr(trust, "__version__", "0.0.1")
    elif change == "name":
        monkeypatch.setattr(trust.Gpu, "of", lambda i: trust.Gpu(0, "Fake 1", (9, 0), "other"))
    else:
        monkeypatch.setattr(trust, f"_{change}", lambda: "another")
    trust.failed(0)
    assert len(made.devices) == 2


def test_it_can_be_turned_off(gpu: trust.Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    made = checks(monkeypatch, WRONG)
    monkeypatch.setenv("NPAD_CHECK", "0")
    assert trust.failed(0) == frozenset()
    assert made.devices == []


def test_no_verdict_is_no_fault_and_is_not_kept(
    gpu: trust.Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = checks(monkeypatch, error="no memory")
    for _ in range(2):
        trust._failed.clear()
        with pytest.warns(RuntimeWarning, match=r"could not be checked on cuda:0 .*\(no memory\)"):
            assert trust.failed(0) == frozenset()
    assert len(made.devices) == 2


def test_a_full_check_that_cannot_be_made_is_an_error(
    gpu: trust.Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks(monkeypatch, error="no memory")
    for device, named in (("cuda:0", r"cuda:0 \(Fake 9000\)"), ("cpu", "cpu")):
        message = rf"^the kernels could not be checked on {named}: no memory$"
        with pytest.raises(RuntimeError, match=message):
            trust.check(torch.device(device))
    assert verdicts.kept(gpu.key) is None


def test_a_gpu_without_code_runs_the_reference(
    gpu: trust.Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = checks(monkeypatch, RIGHT)
    monkeypatch.setattr(trust.cuda, "architectures", "75-real,80-real")
    monkeypatch.setenv("NPAD_CHECK", "0")  # it is no check
    with pytest.warns(RuntimeWarning) as caught:
        assert trust.failed(0) >= set(CASES)
    assert str(caught[0].message) == (
        "npad: cuda:0 (Fake 9000) has compute capability 9.0, for which this build of npad has neither "
        "machine code nor PTX (it was built for 75-real, 80-real); the slower PyTorch reference runs "
        "there. Build npad with CUDAARCHS=90 in the environment"
    )
    assert made.devices == []
    with pytest.raises(RuntimeError, match=r"has compute capability 9\.0, for which this build"):
        trust.check(torch.device("cuda:0"))


def test_a_warning_that_is_an_error_does_not_lose_the_verdict(
    gpu: trust.Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks(monkeypatch, WRONG)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning, match="mahalanobis"):
            trust.failed(0)
        assert trust.failed(0) == {"mahalanobis"}


def test_threads_wait_for_one_check(gpu: trust.Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    started, go_on = threading.Event(), threading.Event()
    made = checks(monkeypatch, RIGHT)

    def slow(device: str, *, full: bool) -> Iterator[Finding]:
        started.set()
        go_on.wait(10)
        yield from made(device, full=full)

    monkeypatch.setattr(children, "findings", slow)
    with ThreadPoolExecutor(4) as pool:
        results = [pool.submit(trust.failed, 0) for _ in range(4)]
        assert started.wait(10)
        assert not any(result.done() for result in results)
        go_on.set()
        assert [result.result() for result in results] == [frozenset()] * 4
    assert made.devices == ["uuid"]


def test_the_full_check_replaces_the_verdict(
    gpu: trust.Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks(monkeypatch, WRONG)
    assert trust.check(torch.device("cuda:0")) == [WRONG]
    assert verdicts.kept(gpu.key) == {"mahalanobis": "size 7: it is off"}
    checks(monkeypatch, RIGHT)
    assert trust.check(torch.device("cuda:0")) == [RIGHT]
    assert verdicts.kept(gpu.key) == {}
    assert trust.failed(0) == frozenset()


# --- the file ---

KEY = {"gpu": "Fake"}


def test_the_folder_is_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for given in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", given)
        assert verdicts.cache_folder() == tmp_path / ".cache/npad"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert verdicts.cache_folder() == tmp_path / "x/npad"


def test_a_verdict_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert verdicts.kept(KEY) is None
    verdicts.keep(KEY, {"embed": "off"})
    assert verdicts.kept(KEY) == {"embed": "off"}
    assert verdicts.kept({"gpu": "other"}) is None


@pytest.mark.parametrize("text", ["", "[]", "{", '{"key": {"gpu": "Fake"}, "faults": []}', "\xff"])
def test_a_file_that_is_damaged_is_none(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    verdicts.keep(KEY, {})
    (file,) = (tmp_path / "npad").iterdir()
    assert json.loads(file.read_text()) == {"key": KEY, "faults": {}}
    with replacing(file) as target:
        target.write(text.encode("latin-1"))
    assert verdicts.kept(KEY) is None


def test_no_folder_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()  # a folder that cannot be made, by root either
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    verdicts.keep(KEY, {})
    assert verdicts.kept(KEY) is None


# --- planted faults, in kernels on the emulator and in child processes ---


def plant(op: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    load("simt_fast")  # builds it, or skips
    monkeypatch.setattr(children, "COMMAND", (CHILD, op, fault))
    monkeypatch.setattr(sys, "path", [str(Path(CHILD).parent), *sys.path])


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("wrong", "size 7: the error is "),
        ("access", "npad.window_covariance: cudaErrorIllegalAddress: an illegal memory access"),
        ("crash", "the process was killed by signal 11 (Segmentation fault)"),
        ("hang", "it was not done in 40 s"),
    ],
)
def test_a_planted_fault_is_found(fault: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And all others are right, whatever became of the process."""
    plant("window_covariance", fault, monkeypatch)
    monkeypatch.setattr(children, "LIMIT", 40)
    found = {f.op: f.fault for f in children.findings("uuid", full=False)}
    assert list(found) == list(CASES)
    assert str(found.pop("window_covariance")).startswith(text)
    assert set(found.values()) == {None}


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("no GPU", "exit status 1: a child process does not see the GPU"),
        ("memory", "CUDA error: out of memory"),
    ],
)
def test_what_is_not_the_kernels_fault(
    fault: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant("embed", fault, monkeypatch)
    with pytest.raises(children.UncheckedError, match=text):
        list(children.findings("uuid", full=False))


def test_a_wrong_kernel_never_gives_a_score(
    gpu: trust.Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole way: the first op has the GPU checked, and from then on the reference runs for one."""
    plant("mahalanobis", "crash", monkeypatch)
    launched = []

    def wrong(op: str, arguments: tuple[Any, ...]) -> None:
        launched.append(op)
        if op == "mahalanobis":
            arguments[-1].zero_()

    use(load("simt_fast"), monkeypatch.setattr, wrong, _cuda._trusted)
    given = {name: case.make(7) for name, case in CASES.items()}

    def run_all() -> dict[str, list[torch.Tensor]]:
        return {name: tensors(case.op(*given[name])) for name, case in CASES.items()}

    with pytest.warns(RuntimeWarning, match=r"on cuda:0 .*: mahalanobis \(the process") as caught:
        results = run_all()
    assert len(caught) == 1
    expected = CASES["mahalanobis"].reference(*given["mahalanobis"])
    assert torch.equal(results["mahalanobis"][0], tensors(expected)[0])
    assert launched == [op for name in CASES if name != "mahalanobis" for op in LAUNCHES[name]]


def test_nothing_searches_by_an_index_of_a_kernel_that_is_wrong(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not even an op that makes one for itself."""
    monkeypatch.setitem(trust._failed, None, frozenset({"centroid_index"}))  # type: ignore[misc]
    launched: list[str] = []
    use(load("simt_fast"), monkeypatch.setattr, lambda op, _: launched.append(op), _cuda._trusted)
    x, centroids = torch.randn(9, 20), torch.randn(130, 20)
    for index in (None, ops.centroid_index(centroids)):
        _, nearest = ops.nearest_centroid(x, centroids, index)
        assert torch.equal(nearest, reference.nearest_centroid(x, centroids)[1])
    assert launched == ["nearest_centroid", "nearest_centroid"]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("failed", [True, False])
def test_pytorch_calls_the_kernel_or_the_reference(
    failed: bool, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its dispatcher passes arguments in its own way; None stands for the GPU's index."""
    monkeypatch.setitem(trust._failed, None, frozenset({name} if failed else ()))  # type: ignore[misc]
    ran = []

    def kernel(*arguments: object) -> object:
        ran.append(name)
        return getattr(reference, name)(*arguments)

    kernel.__name__ = name
    schema = str(getattr(torch.ops.npad, name).default._schema).replace("npad::", "npad_trust::")
    with torch.library._scoped_library("npad_trust", "DEF") as library:
        library.define(schema.removeprefix("npad_trust::"))
        library.impl(name, _cuda._trusted(kernel), "CPU")
        others = {op: getattr(reference, op) for op in trust.OPS}
        asked = SimpleNamespace(**others | {name: getattr(torch.ops.npad_trust, name)})
        monkeypatch.setattr(torch.ops, "npad", asked)
        case = CASES[name]
        arguments = case.make(7)
        results = tensors(case.op(*arguments))
    for a, b in zip(results, tensors(case.reference(*arguments)), strict=True):
        assert torch.equal(a, b)
    assert ran == ([] if failed else [name])


def test_the_gpu_of_the_tensors_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether these come in a list, or one is left out; a wrong GPU does not slow the other down."""
    asked = []

    def failed(index: int | None) -> frozenset[str]:
        asked.append(index)
        return frozenset(trust.OPS)

    monkeypatch.setattr(trust, "failed", failed)
    use(load("simt_fast"), monkeypatch.setattr, wrapped=_cuda._trusted)
    maps = torch.rand(1, 3, 4)
    ops.anomaly_map(None, maps, True, (1.0, 1.0, 0.0), (6, 8), 1.0)
    ops.embed([torch.rand(1, 2, 3, 4)], (3, 4))
    assert asked == [None, None]
    monkeypatch.setattr(_cuda, "registered", True)
    assert not _cuda.run_on(torch.device("cuda:1"))
    assert asked == [None, None, 1]
