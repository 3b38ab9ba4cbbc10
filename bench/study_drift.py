"""Whether the monitor of drift is quiet where nothing changes, and how soon it sees the light change.

    python bench/study_drift.py DIR --network resnet18=FILE --n-centroids 2048 --out DIR

DIR is an MVTec AD category. Its nominal images, of training and test together, are shuffled; npad is
fitted on half of them. The others are what a line might send: CALIBRATED of them calibrate the monitor,
the rest are its stream.

Quiet: the scores of the others are shuffled ORDERS times, and each time a monitor with each bound reads
the stream. Told is how many were ever raised, with the exact interval (95 %) of the rate. All orders
are of one set of images; the bound holds for each of them.

Light: in RAMPS orders, QUIET images of the stream come as they are. From then on each is brighter or
darker than the one before it by a share of the first: its pixels are multiplied, rounded and clipped,
and scored. Told is after how many changed images the monitor with bound 0.01 was raised, the median and
the most, and how bright images were by then. Beside it stands the share of images that were called
anomalous (threshold of a rate of 0.01) between the change and the alarm.

Prints a table for each data set, that of docs/watching.md, and writes study_drift_<name>.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from markdown_table import markdown_table
from numpy.typing import NDArray
from provenance import provenance

from npad import NPad
from npad.calibration import Calibration, DriftMonitor, rate_interval
from npad.evaluation.datasets import find_categories
from npad.images import read_image

BOUNDS = (0.01, 0.05, 0.2)
STEPS = (0.003, -0.003, 0.001, -0.001)  # of the brightness, from one image to the next
CALIBRATED = 0.42  # of the nominal images that were not fitted
QUIET = 0.2  # of them come unchanged before the light changes
ORDERS = 200
RAMPS = 5

Scores = NDArray[np.float64]


def fitted(data: Path, args: argparse.Namespace) -> tuple[NPad, list[Path]]:
    """A model, and nominal images that it was not fitted on."""
    (category,) = find_categories(data)
    good = [*category.train, *(s.path for s in category.test if not s.is_anomalous)]
    good = [good[i] for i in np.random.default_rng(args.seed).permutation(len(good))]
    name, _, file = args.network.partition("=")
    model = NPad(
        name, weights=file or None, n_centroids=args.n_centroids, seed=args.seed, progress=False
    )
    n_fitted = len(good) // 2
    return model.fit(good[:n_fitted]), good[n_fitted:]


def scores_of(model: NPad, images: Sequence[Any]) -> Scores:
    return np.concatenate([batch.scores for batch in model.predict_batches(list(images))])


def lit(path: Path, gain: float) -> NDArray[np.uint8]:
    """An image at another brightness."""
    pixels = np.rint(read_image(path).astype(np.float64) * gain)
    return pixels.clip(0, 255).astype(np.uint8)


def quiet(scores: Scores, seed: int) -> list[dict[str, Any]]:
    """A row for each bound: how many orders raised the monitor."""
    n = round(CALIBRATED * len(scores))
    rows = []
    for bound in BOUNDS:
        rng = np.random.default_rng(seed)  # the same orders for all
        raised = 0
        for i in range(ORDERS):
            order = rng.permutation(scores)
            raised += DriftMonitor(Calibration(order[:n]), bound, seed=i).update(order[n:])
        low, high = rate_interval(raised, ORDERS)
        rows.append(
            {"bound": bound, "calibrated": n, "stream": len(scores) - n, "orders": ORDERS}
            | {"raised": raised, "interval": [low, high]}
        )
    return rows


def ramp(
    model: NPad, paths: Sequence[Path], scores: Scores, step: float, seed: int
) -> dict[str, Any]:
    """How soon monitors are raised when each image differs from the one before by a step."""
    n = round(CALIBRATED * len(paths))
    n_quiet = round(QUIET * len(paths))
    rng = np.random.default_rng(seed)
    early, after, alarms = 0, [], []
    for i in range(RAMPS):
        order = rng.permutation(len(paths))
        changing = order[n + n_quiet :]
        gains = 1 + step * np.arange(1, len(changing) + 1)
        images = (lit(paths[k], gain) for k, gain in zip(changing, gains, strict=True))
        changed = np.concatenate([scores_of(model, [image]) for image in images])
        calibration = Calibration(scores[order[:n]])
        monitor = DriftMonitor(calibration, seed=i)
        monitor.update(np.concatenate([scores[order[n : n + n_quiet]], changed]))
        if monitor.raised_at is None:
            continue
        early += monitor.raised_at <= n_quiet
        if monitor.raised_at > n_quiet:
            after.append(monitor.raised_at - n_quiet)
            alarms.append((changed[: after[-1]] > calibration.threshold(0.01)).mean())
    return {
        "step": step,
        "calibrated": n,
        "quiet": n_quiet,
        "changing": len(paths) - n - n_quiet,
        "orders": RAMPS,
        "raised_early": early,
        "raised_after": after,
        "brightness": [1 + step * a for a in after],
        "alarms_until_then": alarms,
    }


def tables(name: str, rows: Sequence[dict[str, Any]], ramps: Sequence[dict[str, Any]]) -> str:
    told = [
        [
            f"{100 * row['bound']:g} %",
            f"{row['raised']} of {row['orders']}",
            f"{100 * row['interval'][0]:.2f} to {100 * row['interval'][1]:.2f} %",
        ]
        for row in rows
    ]
    first = markdown_table([f"{name}: bound", "raised, nothing having changed", "interval"], told)
    told = []
    for row in ramps:
        after = row["raised_after"]
        last = 1 + row["step"] * row["changing"]
        soon = [f"not in {row['changing']}", f"to {100 * last:.0f} %", "–"]
        if after:
            soon = [
                f"{np.median(after):.0f} ({max(after)})",
                f"{100 * np.median(row['brightness']):.0f} %",
                f"{100 * np.mean(row['alarms_until_then']):.1f} %",
            ]
        told.append(
            [
                f"{100 * row['step']:+.1f} % an image",
                f"{len(after)} of {row['orders']}",
                *soon,
            ]
        )
    heads = [f"{name}: light", "raised", "after images: median (most)", "brightness then"]
    return first + "\n\n" + markdown_table([*heads, "called anomalous until then"], told)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("data", nargs="+", type=Path, help="MVTec AD categories")
    add("--network", default="filterbank", metavar="NAME[=FILE]")
    add("--n-centroids", type=int, default=8192)
    add("--seed", type=int, default=0, help="of the fit, and of all that is shuffled")
    add("--threads", type=int, default=1)
    add("--out", type=Path, required=True, help="folder of the results")
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    for data in args.data:
        name = data.resolve().name
        model, paths = fitted(data, args)
        scores = scores_of(model, paths)
        rows = quiet(scores, args.seed)
        ramps = [ramp(model, paths, scores, step, args.seed) for step in STEPS]
        report = {
            "provenance": provenance(),
            "settings": {
                "data": name,
                "backbone": args.network.partition("=")[0],
                "n_centroids": args.n_centroids,
                "seed": args.seed,
                "fitted": model.n_images_,
            },
            "quiet": rows,
            "light": ramps,
            "scores": scores.tolist(),
        }
        file = args.out / f"study_drift_{name}.json"
        file.write_text(json.dumps(report, indent=1) + "\n")
        print(tables(name, rows, ramps), flush=True)


if __name__ == "__main__":
    main()
