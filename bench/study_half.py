"""What half precision in the backbone does to accuracy, for the images in several orders.

    python bench/study_half.py DIR --backbone resnet18 --weights FILE --orders 0,1,2 --out half.json

DIR is an MVTec AD category. Order 0 is that of the file names; the others are shuffled, by which
k-center chooses other points. Each is fitted once in float32 and scored in every precision, then fitted
and scored in half precision.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
from provenance import provenance

from npad import NPad
from npad.evaluation.datasets import find_categories
from npad.evaluation.measure import evaluate, score
from npad.evaluation.results import CategoryResult

METRICS = ("auroc", "pixel_auroc", "aupro")
HALVES = ("float16", "bfloat16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("--backbone", default="filterbank")
    parser.add_argument("--weights")
    parser.add_argument("--orders", default="0,1,2")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    (category,) = find_categories(args.data)
    rows = []
    report = {
        "provenance": provenance(),
        "settings": {"data": category.name, "backbone": args.backbone},
    }
    print("| order | fitted in | scored in |", " | ".join(METRICS), "| score moves: median, most |")
    print("|---" * (len(METRICS) + 4) + "|", flush=True)
    for order in map(int, args.orders.split(",")):
        train = list(category.train)
        if order:
            random.Random(order).shuffle(train)
        shuffled = replace(category, train=train)
        model = NPad(args.backbone, weights=args.weights, backbone_dtype="float32")
        single = evaluate(model, shuffled, progress=False)
        runs = [("float32", "float32", single)]
        for dtype in HALVES:
            model.backbone_dtype = dtype
            runs.append(("float32", dtype, score(model, shuffled, progress=False)))
        for dtype in HALVES:
            half = NPad(args.backbone, weights=args.weights, backbone_dtype=dtype)
            runs.append((dtype, dtype, evaluate(half, shuffled, progress=False)))
        for fitted, scored, result in runs:
            values = {metric: result.metrics[metric] for metric in METRICS}
            moves = relative_moves(result, single)
            row = {"order": order, "fitted": fitted, "scored": scored, **values, **moves}
            rows.append(row)
            cells = [f"{value:.6f}" for value in values.values()]
            cells.append(", ".join(f"{value:.1e}" for value in moves.values()))
            print(f"| {order} | {fitted} | {scored} |", " | ".join(cells), "|", flush=True)
        args.out.write_text(json.dumps({**report, "rows": rows}, indent=1) + "\n")


def relative_moves(result: CategoryResult, single: CategoryResult) -> dict[str, float]:
    """Of the scores against those in single precision."""
    scores, before = (np.array([image.score for image in r.images]) for r in (result, single))
    moved = np.abs(scores / before - 1)
    return {"score_move_median": float(np.median(moved)), "score_move_most": float(moved.max())}


if __name__ == "__main__":
    main()
