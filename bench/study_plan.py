"""How near a plan comes to the memory that a fit and a prediction take, on the CPU.

    python bench/study_plan.py DATA --weights WEIGHTS --out bench/results

DATA holds the data sets in the MVTec AD layout, WEIGHTS the files that the settings below name. Every
fit and every prediction runs in a process of its own, which first makes the plan: so all libraries are
loaded before. Counted from there is the most that the process has had of anonymous memory: the peak of
its resident set less what of it are mapped files, which are the code of the libraries. With --runs it
is the largest of several processes. The results lie in study_plan.json. Prints a table, in MB.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from markdown_table import markdown_table
from provenance import provenance

RESNET18 = {"backbone": "resnet18", "weights": "resnet18_layers123.safetensors"}
RESNET50 = {"backbone": "legacy_seresnet50", "weights": "resnet50_v1_layers123.safetensors"}
TILES = {**RESNET18, "image_size": 1024, "tile": 512}
# Title: data set, images that are fitted, arguments; and "free", bytes that a fit may think are free.
SETTINGS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "defaults": ("mtd", 200, RESNET18),
    "joint, float32": ("mtd", 120, {**RESNET18, "gaussians": "joint", "factor_dtype": "float32"}),
    "64 features": ("mtd", 300, {**RESNET18, "n_features": 64}),
    "192 x 320, k-means": (
        "elpv_mono", 200,
        {**RESNET18, "image_size": (192, 320), "nominal_set": "kmeans", "n_centroids": 512},
    ),
    "ResNet-50": ("mpdd_metal_plate", 60, RESNET50),
    "filter bank, 384": (
        "mpdd_metal_plate", 60, {"backbone": "filterbank", "image_size": 384, "nominal_set": None},
    ),
    "tiles of 1024": ("mpdd_metal_plate", 20, TILES),
    "the same in strips": ("mpdd_metal_plate", 20, {**TILES, "free": 15 * 10**8}),
}  # fmt: skip


def child(work: str, name: str, data: Path, weights: Path | None, model_file: Path) -> None:
    """Fit or predict, and print the plan beside what was measured."""
    import torch

    from npad import NPad, devices
    from npad.images import ImageSource

    torch.set_num_threads(1)
    data_set, n_images, given = SETTINGS[name]
    arguments = dict(given)
    if "free" in arguments:
        free = arguments.pop("free")
        devices.free_bytes = lambda device: free
    if "weights" in arguments:
        assert weights is not None
        arguments["weights"] = str(weights / arguments["weights"])
    images = sorted(p for p in (data / data_set / "train").rglob("*") if p.is_file())[:n_images]
    model = NPad(**arguments, progress=False)
    source = ImageSource(images, image_size=model.plan(1).settings.size)
    size = source.size_of_first()
    plan = model.plan(len(images), source_size=size, statistics=False)
    before = memory("RssAnon")
    if work == "fit":
        model.fit(images, statistics=False)
        found = {"peak": anonymous_peak() - before}
        found |= {"model": model.nbytes, "planned_model": plan.model}
        model.save(model_file)
    else:
        model = NPad.load(model_file, weights=arguments.get("weights"), progress=False)
        for _ in model.predict_batches(images[:64]):
            pass
        found = {"peak": anonymous_peak() - before}
    planned = plan.fit_peak if work == "fit" else plan.predict_peak
    print(json.dumps({**found, "planned": planned, "n_images": len(images)}))


def memory(field: str) -> int:
    """A figure of /proc/self/status, in bytes."""
    status = Path("/proc/self/status").read_text()
    match = re.search(rf"^{field}:\s+(\d+) kB$", status, re.MULTILINE)
    assert match is not None
    return 1024 * int(match[1])


def anonymous_peak() -> int:
    """The most anonymous memory so far; mapped files only become more."""
    return memory("VmHWM") - memory("RssFile") - memory("RssShmem")


def run(work: str, name: str, args: argparse.Namespace, model_file: Path) -> dict[str, Any]:
    """`child`, in processes of their own."""
    command = [sys.executable, __file__, str(args.data), "--child", work, name, str(model_file)]
    command += ["--weights", str(args.weights)] if args.weights else []
    found = []
    for _ in range(args.runs):
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found.append(json.loads(output.splitlines()[-1]))
    peaks = sorted(one["peak"] for one in found)
    return {**found[0], "peak": peaks[-1], "peaks": peaks}


def table(rows: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Planned and measured, in MB."""
    lines = []
    for name, row in rows.items():
        cells = [name, str(row["fit"]["n_images"])]
        for work in ("fit", "predict"):
            planned, peak = row[work]["planned"], row[work]["peak"]
            cells += [f"{planned / 1e6:.0f}", f"{peak / 1e6:.0f}", f"{planned / peak - 1:+.0%}"]
        cells += [f"{row['fit']['planned_model'] / 1e6:.1f}", f"{row['fit']['model'] / 1e6:.1f}"]
        lines.append(cells)
    heads = ["", "images", *["fit: plan", "measured", ""], *["predict: plan", "measured", ""]]
    return markdown_table([*heads, "model: plan", "model"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--only", help="settings, separated by ;")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        work, name, model_file = args.child
        child(work, name, args.data, args.weights, Path(model_file))
        return
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for name in args.only.split(";") if args.only else SETTINGS:
        with tempfile.TemporaryDirectory() as folder:
            model_file = Path(folder) / "model.npad"
            rows[name] = {work: run(work, name, args, model_file) for work in ("fit", "predict")}
        print(name, rows[name], flush=True)
    print(table(rows))
    if args.out is not None:
        result = {**provenance(), "settings": rows}
        (args.out / "study_plan.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
