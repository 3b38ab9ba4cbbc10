"""What bench/gpu_check.sh asks of Python: the machine, the tests that can run there, the report."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from provenance import commit

Record = dict[str, Any]

# Of tests on the CPU: those of the ops and of what is closest to them.
MODULES = [
    "farthest_first",
    "gaussian",
    "inverse_cholesky",
    "mahalanobis",
    "native_cuda",
    "nearest_centroid",
    "neighborhood_moments",
    "ops",
    "packed",
    "window_covariance",
]


class Target(NamedTuple):
    """What a benchmark is to reach: at least `bound`, or at most, where `bound` is negative."""

    op: str
    case: dict[str, object]
    figure: str
    bound: float


SIZES: list[dict[str, object]] = [
    {"P": 1024, "C": 384},
    {"P": 3136, "C": 550},
    {"P": 1024, "C": 1536},
]
SINGLE = [
    {**size, "batch": 1, "factor": factor} for size in SIZES for factor in ("float32", "float16")
]
LARGE = {"P": 3136, "C": 550}
TARGETS = [
    *(Target("mahalanobis", case, "of_bandwidth", 0.85) for case in SINGLE),
    *(Target("mahalanobis", case, "time / npad: npad window 3", -1.25) for case in SINGLE),
    Target("mahalanobis", {**LARGE, "batch": 32, "factor": "float32"}, "of_roofline", 0.6),
    Target("mahalanobis", {**LARGE, "batch": 32, "factor": "float16"}, "of_roofline", 0.6),
    Target("mahalanobis", SINGLE[2], "time / npad: anomalib", 2.5),
    Target("mahalanobis", SINGLE[3], "time / npad: anomalib", 4.5),
    Target("neighborhood_moments", {"P": 1024, "C": 1536, "batch": 32}, "of_roofline", 0.7),
    Target("neighborhood_moments", {**LARGE, "batch": 32}, "of_roofline", 0.7),
    Target("nearest_centroid", {"N": 32768, "K": 8192, "C": 1536}, "of_roofline", 0.6),
    Target("farthest_first", {"D": 128, "centres": 7802}, "of_roofline", 1 / 2.5),
    Target("farthest_first", {"D": 128, "centres": 7802}, "time / npad: anomalib", 5),
    Target("moments + finalise", {"N": 256, **LARGE}, "time / npad: anomalib", 8),
    Target("fit", {"N": 256}, "seconds", -2),
    Target("predict", {"batch": 1, "n_features": None}, "seconds", -0.002),
    Target("predict", {"batch": 1, "n_features": "auto"}, "seconds", -0.0015),
    Target("predict", {"batch": 32, "n_features": None}, "seconds", -32 / 4000),
    Target("predict", {"batch": 32, "n_features": None}, "time / npad: embedding alone", 0.5),
    Target("predict", {"batch": 32, "n_features": "auto"}, "time / npad: embedding alone", 0.75),
    Target("predict files", {"batch": 32}, "time / npad: slower of the two", 1 / 1.15),
]


def figure(extra: Record, name: str) -> float | None:
    """A figure of a benchmark; "time / npad: x" is the time of contender x over npad's."""
    if name == "seconds":
        return extra.get("medians_s", {}).get("npad")  # type: ignore[no-any-return]
    kind, _, contender = name.partition(": ")
    value = extra.get("ratios", {}).get(contender) if contender else extra.get(kind)
    return None if value is None else float(value)


def assess(benchmarks: list[Record]) -> list[Record]:
    """Each target with what was measured of it on the GPU, None where nothing was."""
    rows = []
    for op, case, name, bound in TARGETS:
        found = [
            figure(b["extra_info"], name)
            for b in benchmarks
            if b["group"] == op
            and b["extra_info"].get("device") == "cuda"
            and case.items() <= b["extra_info"]["case"].items()
        ]
        measured = found[-1] if found else None
        met = measured is not None and (measured <= -bound if bound < 0 else measured >= bound)
        case_text = " ".join(f"{key}={value}" for key, value in case.items())
        sign = "<=" if bound < 0 else ">="
        rows.append(
            {
                "op": op,
                "case": case_text,
                "figure": name,
                "measured": measured,
                "target": f"{sign} {abs(bound):g}",
                "met": met,
            }
        )
    return rows


def ceilings(benchmarks: list[Record]) -> dict[str, float]:
    """Medians of what the benchmarks' processes measured of the GPU."""
    found = [
        b["extra_info"].get("ceilings", {})
        for b in benchmarks
        if b["extra_info"].get("device") == "cuda"
    ]
    names = dict.fromkeys(name for each in found for name in each)
    return {name: statistics.median(c[name] for c in found if name in c) for name in names}


def table(report: Record) -> str:
    """The report for a reader: machine, ceilings, phases, medians, targets."""
    limits = [f"{name} {value:.3g}" for name, value in report["ceilings"].items()]
    lines = [
        ", ".join(f"{key} {value}" for key, value in report["machine"].items()),
        "ceilings: " + (", ".join(limits) or "not measured"),
    ]
    for phase in report["phases"]:
        lines.append("{phase:<26} {seconds:>4} s  {verdict}".format(**phase))
    for benchmark in report["benchmarks"]:
        extra = benchmark["extra_info"]
        times = extra.get("medians_s") or extra.get("per_centre_s", {})
        text = ", ".join(f"{name} {1e3 * value:.4g}" for name, value in times.items())
        path = f" ({extra['path']})" if "path" in extra else ""
        lines.append(f"{benchmark['name']}{path}: {text} ms")
    row_format = "{op:<21} {case:<41} {figure:<27} {measured:>8}  {target:<7} {met}"
    lines.append(row_format.format_map({name: name for name in report["targets"][0]}))
    for row in report["targets"]:
        known = row["measured"] is not None
        met = "yes" if row["met"] else "NO" if known else "not measured"
        measured = f"{row['measured']:.3g}" if known else "-"
        lines.append(row_format.format(**{**row, "measured": measured, "met": met}))
    bad = [phase["phase"] for phase in report["phases"] if phase["verdict"] != "ok"]
    reached = sum(row["met"] for row in report["targets"])
    lines.append(f"{reached} of {len(report['targets'])} targets met")
    lines.append(f"phases not ok: {', '.join(bad) or 'none'}")
    return "\n".join(lines)


def write_report(out: Path) -> str:
    """Bring OUT/report.json up to date with benchmarks.jsonl and phases.tsv; return the table."""
    path, results, phases = out / "report.json", out / "benchmarks.jsonl", out / "phases.tsv"
    report: Record = json.loads(path.read_text())
    lines = results.read_text().splitlines() if results.exists() else []
    benchmarks = [json.loads(line) for line in lines]
    rows = [line.split("\t") for line in phases.read_text().splitlines()] if phases.exists() else []
    report["phases"] = [{"phase": n, "verdict": v, "seconds": int(s)} for n, v, s in rows]
    report["ceilings"] = ceilings(benchmarks)
    report["targets"] = assess(benchmarks)
    report["benchmarks"] = benchmarks
    path.write_text(json.dumps(report, indent=1) + "\n")
    return table(report)


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip().splitlines()[0]


def write_machine(out: Path) -> str:
    """Start OUT/report.json with what the run is on; return the GPU's architecture."""
    try:
        import torch
    except ImportError as error:
        sys.exit(f"gpu_check: PyTorch cannot be imported: {error}")
    if not torch.cuda.is_available():
        sys.exit(f"gpu_check: PyTorch {torch.__version__} sees no GPU")
    machine = {
        "device": torch.cuda.get_device_name(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        **commit(),
    }
    (out / "report.json").write_text(json.dumps({"machine": machine}, indent=1) + "\n")
    return "{}{}".format(*torch.cuda.get_device_capability())


def missing_imports(path: Path) -> list[str]:
    """Packages that a test file imports at its top and this Python lacks."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    beside = {p.stem for p in path.parent.glob("*.py")}
    return sorted(n for n in names - beside if importlib.util.find_spec(n) is None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["machine", "report", "runnable", "left-out"])
    parser.add_argument("folder", type=Path, help="OUT, or that of the tests")
    arguments = parser.parse_args()
    what, folder = arguments.what, arguments.folder
    if what == "machine":
        print(write_machine(folder))
    elif what == "report":
        print(write_report(folder))
    else:
        for path in (folder / f"test_{module}.py" for module in MODULES):
            missing = missing_imports(path)
            if what == "runnable" and not missing:
                print(path)
            elif what == "left-out" and missing:
                print(f"left out {path}: {', '.join(missing)} not installed")
        if what == "left-out":
            print("left out: the tests of all but the ops, and those in the emulator")


if __name__ == "__main__":
    main()
