"""Whether thresholds keep the rate of false alarms that they state, on real scores.

    python bench/study_calibration.py DIR --network resnet18=FILE --n-centroids 2048 --out DIR

DIR is an MVTec AD category. Its nominal images, of training and test together, are shuffled; npad is
fitted on half of them and scores the others and the defective ones, once. Then the scores of the
nominal ones are split at random, again and again, into a calibration and a test. Every threshold is
chosen on the calibration. Told are the rate of false alarms in the test, its mean over all splits with
a 99 % interval; the share of splits whose rate is above the one asked for, and what the law of these
thresholds expects of it, for a test of this size; and the share of defective images found, the mean
over the splits. Beside them is the usual threshold, so many standard deviations above the mean.

Prints a table for each data set, that of docs/thresholds.md, and writes study_calibration_<name>.json
with all scores.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from markdown_table import markdown_table
from numpy.typing import NDArray
from provenance import provenance
from scipy import stats

from npad import NPad
from npad.calibration import Calibration, images_needed
from npad.evaluation.datasets import find_categories

RATES = (0.01, 0.02, 0.05, 0.1)
CONFIDENCE = 0.95
CALIBRATED = 0.65  # of the nominal images that were not fitted
SPLITS = 1000

Scores = NDArray[np.float64]
Threshold = Callable[[Scores], float]


def scored(data: Path, args: argparse.Namespace) -> tuple[Scores, Scores, int]:
    """Scores of nominal images that were not fitted, and of defective ones; the number fitted."""
    (category,) = find_categories(data)
    good = [*category.train, *(s.path for s in category.test if not s.is_anomalous)]
    good = [good[i] for i in np.random.default_rng(args.seed).permutation(len(good))]
    bad = [sample.path for sample in category.test if sample.is_anomalous]
    name, _, file = args.network.partition("=")
    model = NPad(
        name, weights=file or None, n_centroids=args.n_centroids, seed=args.seed, progress=False
    )
    n_fitted = len(good) // 2
    model.fit(good[:n_fitted])

    def scores(paths: Sequence[Path]) -> Scores:
        batches = model.predict_batches(paths)
        return np.concatenate([batch.scores for batch in batches]).astype(np.float64)

    return scores(good[n_fitted:]), scores(bad), n_fitted


def thresholds(n: int) -> Iterator[tuple[float, str, Threshold, int | None]]:
    """Rate that is asked for, name, how to choose it on n scores, and its rank from the highest."""
    for rate in RATES:
        for confidence in (None, CONFIDENCE):
            if n >= images_needed(rate, confidence):
                name = "conformal" + (f", confidence {confidence}" if confidence else "")
                choose = partial(chosen, rate=rate, confidence=confidence)
                # Of the scores 1, ..., n it chooses n + 1 - k.
                yield rate, name, choose, n + 1 - round(choose(np.arange(1.0, n + 1)))
        sigmas = stats.norm.isf(rate)
        yield rate, f"mean + {sigmas:.2f} sd", partial(gaussian, sigmas=sigmas), None
    yield float(stats.norm.sf(3)), "mean + 3 sd", partial(gaussian, sigmas=3.0), None


def chosen(scores: Scores, rate: float, confidence: float | None) -> float:
    return Calibration(scores).threshold(rate, confidence)


def gaussian(scores: Scores, sigmas: float) -> float:
    return float(scores.mean() + sigmas * scores.std(ddof=1))


def measured(good: Scores, bad: Scores, seed: int) -> Iterator[dict[str, Any]]:
    """A row for each threshold."""
    n = int(CALIBRATED * len(good))
    n_test = len(good) - n
    for rate, name, choose, k in thresholds(n):
        rng = np.random.default_rng(seed)  # the same splits for all
        alarms, found = np.empty(SPLITS), np.empty(SPLITS)
        for i in range(SPLITS):
            split = rng.permutation(good)
            threshold = choose(split[:n])
            alarms[i] = (split[n:] > threshold).mean()
            found[i] = (bad > threshold).mean()
        # As splits are drawn from one set of images, this is the error of their finite number alone.
        error = stats.norm.isf(0.005) * alarms.std(ddof=1) / math.sqrt(SPLITS)
        most = math.floor(round(rate * n_test, 9))
        law = None if k is None else stats.betabinom(n_test, k, n + 1 - k)
        yield {
            "rate": rate,
            "threshold": name,
            "calibrated": n,
            "tested": n_test,
            "false_alarms": alarms.mean(),
            "interval": [alarms.mean() - error, alarms.mean() + error],
            "splits_over": (alarms > rate).mean(),
            "splits_over_expected": None if law is None else float(law.sf(most)),
            "found": found.mean(),
        }


def table(name: str, rows: Sequence[dict[str, Any]]) -> str:
    heads = [f"{name}: asked for", "threshold", "false alarms, 99 % interval"]
    heads += ["splits above", "expected", "defective found"]
    lines = []
    for row in rows:
        low, high = row["interval"]
        expected = row["splits_over_expected"]
        lines.append(
            [
                f"{100 * row['rate']:.3g} %",
                row["threshold"],
                f"{100 * row['false_alarms']:.2f} % ({100 * low:.2f}, {100 * high:.2f})",
                f"{100 * row['splits_over']:.1f} %",
                "" if expected is None else f"{100 * expected:.1f} %",
                f"{100 * row['found']:.1f} %",
            ]
        )
    return markdown_table(heads, lines)


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
        good, bad, n_fitted = scored(data, args)
        rows = list(measured(good, bad, args.seed))
        report = {
            "provenance": provenance(),
            "settings": {
                "data": name,
                "backbone": args.network.partition("=")[0],
                "n_centroids": args.n_centroids,
                "seed": args.seed,
                "fitted": n_fitted,
                "splits": SPLITS,
            },
            "rows": rows,
            "scores": {"nominal": good.tolist(), "defective": bad.tolist()},
        }
        file = args.out / f"study_calibration_{name}.json"
        file.write_text(json.dumps(report, indent=1) + "\n")
        print(table(name, rows), flush=True)


if __name__ == "__main__":
    main()
