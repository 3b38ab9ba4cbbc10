"""What networks cost and give on a data set: accuracy, CPU time of fit and predict, model size.

    python bench/networks.py CATEGORY tf_efficientnet_lite0 resnet18=FILE \
        resnet18=FILE+tf_efficientnet_lite0 --threads 1 --out FILE.json

CATEGORY is a folder in the MVTec AD layout. Networks are joined by "+" where a model has several. All
have npad's defaults. Times are CPU seconds of the process, so that other work on the machine counts
less: of one fit, and of predicting the same images in turn, from files to scores and maps, the least
of three.
"""

from __future__ import annotations

import argparse
import json
import time
from math import isnan
from pathlib import Path
from typing import Any

import torch
from provenance import provenance

from npad import NPad
from npad.evaluation.datasets import find_categories
from npad.evaluation.measure import evaluate

METRICS = "auroc", "pixel_auroc", "aupro"
ROUNDS, IMAGES = 3, 64


class Timed(NPad):
    """Keeps the CPU time of its fit."""

    def fit(self, *args: Any, **more: Any) -> Timed:
        start = time.process_time()
        super().fit(*args, **more)
        self.fit_seconds_ = time.process_time() - start
        return self


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("category", type=Path)
    parser.add_argument("networks", nargs="+", metavar="NAME[=WEIGHTS][+...]")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    (category,) = find_categories(args.category)
    images = sorted(p for p in (args.category / "test").rglob("*") if p.is_file())[:IMAGES]
    rows, models = {}, {}
    for network in args.networks:
        pairs = [one.partition("=") for one in network.split("+")]
        name = " + ".join(one for one, _, _ in pairs)
        files = [file or None for _, _, file in pairs]
        model = Timed([one for one, _, _ in pairs], weights=files, progress=False)
        result = evaluate(model, category)
        models[name] = model
        rows[name] = {
            **{key: result.metrics[key] for key in METRICS if not isnan(result.metrics[key])},
            "fit_cpu_seconds": model.fit_seconds_,
            "predict_cpu_ms": float("inf"),
            "megabytes": model.nbytes / 1e6,
        }
    for _ in range(ROUNDS):
        for name, model in models.items():
            start = time.process_time()
            model.predict(images)
            spent = 1e3 * (time.process_time() - start) / len(images)
            rows[name]["predict_cpu_ms"] = min(rows[name]["predict_cpu_ms"], spent)
    for name, row in rows.items():
        print(name, *(f"{key} {value:.4g}" for key, value in row.items()))
    if args.out:
        about = provenance() | {"data": args.category.name, "threads": args.threads}
        args.out.write_text(json.dumps(about | {"networks": rows}, indent=1))


if __name__ == "__main__":
    main()
