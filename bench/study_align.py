"""What registration is worth: images moved at random, with each ``align``.

    python bench/study_align.py DIR --backbone resnet18 --weights FILE --out DIR

DIR is an MVTec AD category, with masks or without. Its images are drawn and moved as in
study_jitter.py: a jitter of J shifts every image, to fit and to score, by up to J/256 of each side and
turns it by up to J/128 radians; the image's own reflection comes in at the borders. A jitter of 0 is
the data as they are. Prints a table for each metric and writes all figures to study_align_<name>.json
jitter by jitter, with how many images could not be registered and the time that registering takes, an
image at a time on one thread.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from embedded import METRICS
from markdown_table import markdown_table
from provenance import provenance
from study_jitter import cell, drawn, jittered, numbers

from npad import NPad
from npad.environment import versions
from npad.evaluation.datasets import Category, find_categories
from npad.evaluation.measure import evaluate
from npad.images import ImageSource
from npad.images.alignment import Aligner

ALIGN = (None, "translation", "euclidean")

Figures = dict[str, float]


def figures(model: NPad, category: Category) -> Figures:
    """Fit, score and measure; what could not be registered, and how long registering takes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*could not be registered", UserWarning)
        found = evaluate(model, category, progress=False)
    known = METRICS if found.has_masks else METRICS[:1]
    kept = {name: found.metrics[name] for name in known}
    if model.align is None:
        return kept
    assert model.template_ is not None
    aligner = Aligner(model.template_, model.align)
    source = ImageSource([sample.path for sample in category.test], image_size=model.input_size())
    unaligned, seconds = 0, []
    for batch in source.batches():
        for image, size in zip(batch.images, batch.sizes, strict=True):
            start = time.perf_counter()
            unaligned += aligner(image, size).motion is None
            seconds.append(time.perf_counter() - start)
    return kept | {
        "unaligned_to_fit": len(model.unaligned_),
        "unaligned_to_score": unaligned,
        "milliseconds": 1e3 * float(np.median(seconds)),
    }


def study(data: Path, args: argparse.Namespace) -> None:
    """One category at every jitter with every seed; its tables are printed and its file written."""
    name = data.resolve().name
    report: dict[str, Any] = {
        "provenance": provenance(),
        "settings": {
            "data": name,
            "backbone": args.backbone,
            "image_size": args.image_size,
            "n_centroids": args.n_centroids,
            "at_most": dict(zip(("train", "good", "defective"), args.images, strict=True)),
            "seeds": args.seeds,
        },
        "rows": {},
    }
    report["provenance"]["packages"] |= versions("opencv-python-headless")
    (whole,) = find_categories(data)
    for seed in args.seeds:
        category = drawn(whole, args.images, seed)
        for jitter in args.jitters:
            with tempfile.TemporaryDirectory() as scratch:
                there = jittered(category, jitter, seed, Path(scratch))
                for align in ALIGN:
                    model = NPad(
                        args.backbone,
                        weights=args.weights,
                        image_size=args.image_size,
                        n_centroids=args.n_centroids,
                        align=align,
                        seed=seed,
                        progress=False,
                    )
                    rows = report["rows"].setdefault(str(align).lower(), {})
                    rows.setdefault(f"{jitter:g}", []).append(figures(model, there))
            (args.out / f"study_align_{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    print("\n\n".join(tables(name, report["rows"])), flush=True)


def tables(name: str, rows: dict[str, dict[str, list[Figures]]]) -> Iterable[str]:
    """For each metric, the mean over the seeds; then what could not be registered, and the time."""
    jitters = list(rows["none"])
    for metric in METRICS:
        if metric in rows["none"][jitters[0]][0]:
            lines = [
                [row, *(cell([run[metric] for run in at[jitter]]) for jitter in jitters)]
                for row, at in rows.items()
            ]
            yield markdown_table([f"{name}: {metric}", *jitters], lines)
    for what in ("unaligned_to_fit", "unaligned_to_score", "milliseconds"):
        lines = [
            [row, *(f"{fmean(run[what] for run in at[jitter]):.1f}" for jitter in jitters)]
            for row, at in rows.items()
            if row != "none"
        ]
        yield markdown_table([f"{name}: {what}", *jitters], lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("data", nargs="+", type=Path, help="MVTec AD categories")
    add("--backbone", default="filterbank")
    add("--weights", type=Path)
    add("--image-size", type=int, default=256)
    add("--n-centroids", type=int, default=8192)
    add("--jitters", type=numbers(float), default=[0.0, 10.0, 20.0])
    add("--seeds", type=numbers(int), default=[0])
    add("--images", type=numbers(int), default=[100, 50, 50], help="to fit, good, defective")
    add("--out", type=Path, required=True, help="folder of the results")
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    for data in args.data:
        study(data, args)


if __name__ == "__main__":
    main()
