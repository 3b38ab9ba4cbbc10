"""npad beside anomalib's PaDiM and PatchCore: same images, same weights, same machine.

    python bench/bench_peers.py --data DIR --weights FILE --out peers.json --method all

DIR is one category in the MVTec AD layout; FILE is a safetensors state dict of
``timm.create_model("resnet18", features_only=True, out_indices=(1, 2, 3))``. bench/peers.md says
what is measured and how. Fitting and predicting run in a process of their own each, so that
a peak of memory belongs to one of them; what they leave in ``--raw`` is not computed again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markdown_table import markdown_table
from peer_methods import (
    BATCH,
    CORESET_RATIO,
    SETTINGS,
    SIZE,
    Anomalib,
    Clock,
    Npad,
    anomalib_batches,
)
from provenance import provenance

# Nothing heavy is imported up here: at exec a child inherits the peak of memory of its parent,
# so the parent stays small until every child has run.
if TYPE_CHECKING:
    from npad.evaluation.datasets import Category

# ------------------------------------------------------- what runs in a process of its own each


def machine() -> dict[str, Any]:
    from npad.environment import versions

    found = provenance()
    packages = found["packages"] | versions("anomalib", "torchvision")
    return {**found, "packages": packages, "nice": os.nice(0)}


def peak_rss_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def category_of(data: Path) -> Category:
    from npad.evaluation.datasets import find_categories

    (category,) = find_categories(data)
    return category


def run_phase(method: str, phase: str, args: argparse.Namespace) -> None:
    """Fit or predict; leaves <method>_<phase>.json and the model, or the scores and maps."""
    import numpy as np
    import torch

    torch.set_num_threads(args.threads)
    record: dict[str, Any] = {"machine": machine(), "seed": args.seed}
    record["note"] = args.note
    clock = Clock()
    category = category_of(args.data)
    peer: Npad | Anomalib
    if method == "npad":
        peer = Npad(args.weights, args.seed)
    else:
        peer = Anomalib(method, args.weights, args.seed, args.raw)
    model_file = args.raw / f"{method}.model"
    if phase == "fit":
        paths = category.train
        peer.fit(paths, clock)
        record["peak_rss_bytes"] = peak_rss_bytes()
        peer.save(model_file)
        record["model_bytes"] = model_file.stat().st_size
    else:
        paths = [sample.path for sample in category.test]
        peer.load(model_file)
        peer.predict(paths[:BATCH])  # the first call pays for threads and caches
        with clock.phase("predict"):
            scores, maps = peer.predict(paths)
        record["peak_rss_bytes"] = peak_rss_bytes()
        names = [str(path.relative_to(args.data)) for path in paths]
        np.savez(args.raw / f"{method}.npz", names=names, scores=scores, maps=np.stack(maps))
    record |= {"n_images": len(paths), "phases": clock.phases, "settings": peer.settings}
    write_json(args.raw / f"{method}_{phase}.json", record)


def seconds_per_centre(args: argparse.Namespace, warm_up: int = 3, centres: int = 30) -> None:
    """Time anomalib's own coreset loop, centre by centre, on the training images' embeddings."""
    import torch
    from anomalib.models.components.sampling import KCenterGreedy

    times: list[float] = []

    class TimedSampler(KCenterGreedy):
        def update_distances(self, cluster_center: Any) -> None:
            times.append(time.perf_counter())
            super().update_distances(cluster_center)

    torch.set_num_threads(args.threads)
    model = Anomalib("patchcore", args.weights, args.seed, args.raw).model.train()
    embedding = torch.vstack([model(x) for x in anomalib_batches(category_of(args.data).train)])
    model.embedding_store.clear()
    runs = []
    for threads in sorted({1, args.threads}):
        torch.set_num_threads(threads)
        sampler = TimedSampler(embedding, CORESET_RATIO)
        sampler.coreset_size = (
            warm_up + centres + 2
        )  # one is given; n steps lie between n + 1 times
        times.clear()
        load = os.getloadavg()[0]
        sampler.select_coreset_idxs()
        steps = [end - start for start, end in itertools.pairwise(times)][warm_up:]
        runs.append(
            {
                "threads": threads,
                "points": list(sampler.features.shape),
                "centres": len(steps),
                "median_s": statistics.median(steps),
                "min_s": min(steps),
                "max_s": max(steps),
                "load_average": load,
            }
        )
        print(json.dumps(runs[-1]), flush=True)
    record = {"machine": machine(), "seed": args.seed, "note": args.note, "runs": runs}
    write_json(args.out, record)


# ------------------------------------------------------------------------------ what starts them


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")


def run_children(method: str, args: argparse.Namespace) -> None:
    for phase in ("fit", "predict"):
        if (args.raw / f"{method}_{phase}.json").exists():
            continue
        command = [sys.executable, __file__, "--child", method, phase, "--data", args.data]
        command += ["--weights", args.weights, "--out", args.out, "--raw", args.raw]
        command += ["--seed", str(args.seed), "--threads", str(args.threads), "--note", args.note]
        # PatchCore's progress bar: a line a minute keeps a log readable.
        child = subprocess.run(command, check=False, env=os.environ | {"TQDM_MININTERVAL": "60"})
        if child.returncode:
            sys.exit(f"bench_peers: {method}, {phase}: failed with status {child.returncode}")


def measure(method: str, args: argparse.Namespace) -> dict[str, Any]:
    """Accuracy from the scores and maps that the predicting process left, with its timings."""
    import numpy as np

    from npad.evaluation.metrics import image_metrics, pixel_metrics
    from npad.images.masks import read_mask, resample_mask

    result: dict[str, Any] = {}
    for phase in ("fit", "predict"):
        result[phase] = json.loads((args.raw / f"{method}_{phase}.json").read_text())
    with np.load(args.raw / f"{method}.npz") as raw:
        names, scores, maps = raw["names"].tolist(), raw["scores"], raw["maps"]
    samples = {str(s.path.relative_to(args.data)): s for s in category_of(args.data).test}
    masks = np.zeros(maps.shape, dtype=bool)
    for mask, name in zip(masks, names, strict=True):
        if (mask_path := samples[name].mask_path) is not None:
            mask[:] = resample_mask(read_mask(mask_path), (SIZE, SIZE))
    labels = np.array([samples[name].is_anomalous for name in names])
    result["image"] = image_metrics(labels, scores)
    result["image_by_map_maximum"] = image_metrics(labels, maps.max(axis=(1, 2)))
    result["pixel"] = pixel_metrics(masks, maps)
    return result


def table(results: dict[str, dict[str, Any]]) -> str:
    head = (
        "method|image AUROC (own score / map maximum)|pixel AUROC|AUPRO 0.3|fit, wall s|fit, CPU s"
    )
    head += "|predict, ms an image, wall (CPU)|peak MB, fit / predict|model MB"
    rows = []
    for method, r in results.items():
        fit, predict = r["fit"], r["predict"]
        each = {k: 1000 * s / predict["n_images"] for k, s in predict["phases"]["predict"].items()}
        wall, cpu = (
            " + ".join(f"{phase[key]:.1f} ({name})" for name, phase in fit["phases"].items())
            for key in ("wall_s", "cpu_s")
        )
        rows.append(
            [
                method,
                f"{r['image']['auroc']:.4f} / {r['image_by_map_maximum']['auroc']:.4f}",
                f"{r['pixel']['pixel_auroc']:.4f}",
                f"{r['pixel']['aupro']:.4f}",
                wall,
                cpu,
                f"{each['wall_s']:.1f} ({each['cpu_s']:.1f})",
                f"{fit['peak_rss_bytes'] / 1e6:.0f} / {predict['peak_rss_bytes'] / 1e6:.0f}",
                f"{fit['model_bytes'] / 1e6:.1f}",
            ]
        )
    return markdown_table(head.split("|"), rows)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="npad beside anomalib's PaDiM and PatchCore")
    add = parser.add_argument
    add("--data", type=Path, required=True, help="one category in the MVTec AD layout")
    add("--weights", type=Path, required=True, help="ResNet-18 state dict, safetensors")
    add("--out", type=Path, required=True, help="JSON file to write")
    add("--method", choices=(*SETTINGS, "all"), default="all")
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=os.cpu_count())
    add("--raw", type=Path, help="keep models, scores and maps here; what is there is not rerun")
    add("--note", default="", help="a sentence for the JSON, beside what this call ran")
    add("--coreset-seconds-per-centre", action="store_true", help="only time anomalib's coreset")
    add("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not (args.data / "train" / "good").is_dir():
        parser.error(f"--data {args.data}: no train/good; give one category in the MVTec AD layout")
    if not args.weights.is_file():
        parser.error(f"--weights {args.weights}: no such file")
    return args


def main() -> None:
    args = parse_arguments()
    with tempfile.TemporaryDirectory(prefix="npad_peers_") as scratch:
        args.raw = args.raw or Path(scratch)
        args.raw.mkdir(parents=True, exist_ok=True)
        if args.child:
            method, phase = args.child
            run_phase(method, phase, args)
        elif args.coreset_seconds_per_centre:
            seconds_per_centre(args)
        else:
            methods = SETTINGS if args.method == "all" else (args.method,)
            for method in methods:
                run_children(method, args)
            results = {method: measure(method, args) for method in methods}
            report = {"image_size": SIZE, "batch_size": BATCH}
            write_json(args.out, report | {"methods": results})
            print(table(results))


if __name__ == "__main__":
    main()
