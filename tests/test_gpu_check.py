"""bench/gpu_check.sh without a GPU: its report, its refusals, and that a phase cannot stop the next."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from npad import NPad

BENCH = Path(__file__).parents[1] / "bench"
TOOLS = ["bash", "cat", "dirname", "mkdir", "mktemp", "rm", "tee", "timeout", "xargs"]


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, BENCH / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def benchmark(group: str, case: dict[str, object], **extra: object) -> dict[str, Any]:
    extra = {"device": "cuda", "case": case, "ceilings": {"copy_bytes_per_s": 3e12}, **extra}
    return {"group": group, "name": f"bench_{group}[made up]", "extra_info": extra}


SINGLE = {"P": 3136, "C": 550, "batch": 1, "factor": "float16"}
MADE_UP = [
    benchmark(
        "mahalanobis", SINGLE, of_bandwidth=0.9, ratios={"anomalib": 4.4}, medians_s={"npad": 1e-3}
    ),
    benchmark("mahalanobis", {**SINGLE, "P": 1024, "C": 384}, ratios={"npad window 3": 1.25}),
    benchmark("mahalanobis", {**SINGLE, "C": 384}, of_bandwidth=0.95),
    benchmark("mahalanobis", {**SINGLE, "batch": 32}, of_roofline=0.59, device="cpu"),
    benchmark("farthest_first", {"D": 128, "centres": 7802}, of_roofline=0.41),
]


def test_targets_are_compared_with_their_own_case_on_the_gpu() -> None:
    rows = load("gpu_report").assess(MADE_UP)
    known = {
        (r["op"], r["case"], r["figure"]): (r["measured"], r["met"])
        for r in rows
        if r["measured"] is not None
    }
    case = "P={} C={} batch=1 factor=float16"
    assert known == {
        ("mahalanobis", case.format(3136, 550), "of_bandwidth"): (0.9, True),
        ("mahalanobis", case.format(3136, 550), "time / npad: anomalib"): (4.4, False),
        ("mahalanobis", case.format(1024, 384), "time / npad: npad window 3"): (1.25, True),
        ("farthest_first", "D=128 centres=7802", "of_roofline"): (0.41, True),
    }
    assert not any(r["met"] for r in rows if r["measured"] is None)


def test_report_holds_what_there_is_so_far(tmp_path: Path) -> None:
    report = load("gpu_report")
    (tmp_path / "report.json").write_text(json.dumps({"machine": {"device": "made up"}}))
    assert "phases not ok: none" in report.write_report(tmp_path)
    lines = "".join(json.dumps(b) + "\n" for b in MADE_UP)
    (tmp_path / "benchmarks.jsonl").write_text(lines)
    (tmp_path / "phases.tsv").write_text("build\tok\t40\nmemcheck\tover 70 s\t70\n")
    text = report.write_report(tmp_path)
    assert f"3 of {len(report.TARGETS)} targets met\nphases not ok: memcheck" in text
    assert "copy_bytes_per_s 3e+12" in text
    assert "npad 1 ms" in text
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["machine"] == {"device": "made up"}
    assert written["benchmarks"] == MADE_UP
    assert written["phases"][1] == {"phase": "memcheck", "verdict": "over 70 s", "seconds": 70}


def test_every_target_names_a_case_that_is_benchmarked() -> None:
    cases: dict[str, list[dict[str, object]]] = {}
    for path in set(BENCH.glob("bench_*.py")) - {BENCH / "bench_peers.py"}:  # a program
        for function in vars(load(path.stem)).values():
            marks = {mark.name: mark for mark in getattr(function, "pytestmark", ())}
            if "cases" in marks:
                group = cases.setdefault(marks["benchmark"].kwargs["group"], [])
                group += [case._asdict() for case in marks["cases"].kwargs.get("cuda", ())]
    for group, case, _, _ in load("gpu_report").TARGETS:
        assert any(case.items() <= c.items() for c in cases[group]), (group, case)


def test_every_test_file_and_benchmark_that_it_runs_is_there() -> None:
    text = (BENCH / "gpu_check.sh").read_text()
    looped = text.partition("for op in mahalanobis")[2].partition("; do")[0].replace("\\", "")
    files = [
        *(f"tests/test_{module}.py" for module in load("gpu_report").MODULES),
        *(f"bench/bench_{op}.py" for op in ["mahalanobis", *looped.split()]),
        *re.findall(r"(?:tests|bench)/\w+\.py", text),
    ]
    assert len(files) > 20
    assert not [file for file in files if not (BENCH.parent / file).is_file()]


def test_tests_that_lack_a_package_are_named(tmp_path: Path) -> None:
    path = tmp_path / "test_x.py"
    path.write_text(
        "import os\nimport beside\nfrom nowhere.at import all\ndef f(): import elsewhere\n"
    )
    (tmp_path / "beside.py").touch()
    assert load("gpu_report").missing_imports(path) == ["nowhere"]


def run(tools: Path, out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    for name in TOOLS:
        found = shutil.which(name)
        if found is None:
            pytest.skip(f"{name} is not installed")
        (tools / name).symlink_to(found)
    return subprocess.run(
        [tools / "bash", BENCH / "gpu_check.sh", out],
        env={**os.environ, **environment, "PATH": str(tools)},
        capture_output=True,
        text=True,
        check=False,
    )


def script(path: Path, text: str) -> None:
    path.write_text(f"#!{shutil.which('bash')}\n{text}")
    path.chmod(0o755)


@pytest.mark.parametrize("lacking", ["python3", "nvcc", "GPU"])
def test_says_in_one_line_what_is_lacking(tmp_path: Path, lacking: str) -> None:
    if lacking != "python3":
        script(tmp_path / "python3", f'exec "{sys.executable}" "$@"')
    if lacking == "GPU":
        script(tmp_path / "nvcc", "exit 1")
    done = run(tmp_path, tmp_path / "out", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 64
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("gpu_check: ")
    assert lacking in line


STUB = """
case "$*" in
"bench/gpu_report.py machine "*) echo '{"machine": {}}' >"$3/report.json"; echo 90 ;;
*"-m pip"*) echo no compiler; exit 3 ;;
*bench_mahalanobis*) echo "$LINE" >"${@: -1}" ;;
*bench_farthest_first*) exit 1 ;;
*"-m pytest"* | *timeline*) ;;
*) exec "$PYTHON" "$@" ;;
esac
"""


def test_a_phase_that_fails_is_named_and_the_next_ones_run(tmp_path: Path) -> None:
    tools, out = tmp_path / "tools", tmp_path / "out"
    tools.mkdir()
    script(tools / "nvcc", "exit 1")
    script(tools / "python3", STUB)
    done = run(tools, out, PYTHON=sys.executable, LINE=json.dumps(MADE_UP[0]))
    assert done.stderr == ""
    assert done.returncode == 1 + 4 + 8 + 16 + 32
    assert done.stdout.splitlines()[-1] == (
        "phases not ok: build, memcheck, racecheck, bench farthest_first, synccheck"
    )
    assert "left out: the tests of all but the ops" in done.stdout
    report = json.loads((out / "report.json").read_text())
    verdicts = {p["phase"]: p["verdict"] for p in report["phases"]}
    assert verdicts["build"] == "failed (3)"
    assert verdicts["memcheck"] == "not installed"
    assert verdicts["bench pack_factor"] == verdicts["2^31 elements"] == "ok"
    assert report["benchmarks"] == MADE_UP[:1]
    assert "no compiler" in (out / "build.log").read_text()
    assert len(list(out.iterdir())) <= 8


def test_the_timeline_runs_every_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    model = NPad("filterbank", image_size=32, holdout=0.3).fit(torch.rand(8, 3, 32, 32))
    parts = load("timeline").parts(model, torch.rand(2, 3, 32, 32))
    assert len(parts) == 8  # of them three layers, and the nominal set
    for part in parts.values():
        part()
