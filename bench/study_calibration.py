"""Whether thresholds keep the rate of false alarms that they state, on real images.

    python bench/study_calibration.py DIR [DIR ...] --network resnet18=FILE --out DIR

A DIR is an MVTec AD category. Its nominal images, of training and test together, are shuffled and
split, again and again, into images to fit, to choose a threshold, and to test it; npad is fitted anew
on each split. Images go through the backbone once. Told are the rate of false alarms in the test, its
mean over the splits with a 99 % interval; the share of splits whose rate is above the one asked for,
and what the law of these thresholds expects of it, for a test of this size; and the share of defective
images found, the mean over the splits.

The images that fit and choose are also used together: all are fitted, and each is scored by a model of
the others (``calibration_folds``).

Beside them, on the same scores: so many standard deviations above the mean; the highest score of the
images that choose, which is anomalib's threshold where it is shown no defect; and the threshold of the
best F1 on these images and half of the defective ones, which is anomalib's where it is shown some. Its
rate of defects found is that of the other half.

Prints a table for each data set, those of docs/thresholds.md, and writes study_calibration_<name>.json.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from markdown_table import markdown_table
from numpy.typing import NDArray
from provenance import provenance
from scipy import stats
from torch import Tensor

from npad.calibration import Calibration, images_needed
from npad.cross_calibration import CrossCalibration
from npad.evaluation.datasets import find_categories
from npad.evaluation.metrics import best_f1
from npad.features.backbone import Backbone, levels_in_parts, shared_backbone
from npad.fitting import Fit
from npad.images import ImageSource
from npad.members import members_of
from npad.scoring.scorer import Scorer, embeddings
from npad.settings import Settings

RATES = (0.01, 0.02, 0.05, 0.1)
CONFIDENCE = 0.95
FITTED, CALIBRATED = 0.5, 0.3  # of the nominal images; the rest tests
FOLDS = 5
BATCH = 8
SPLIT, CROSSED = "conformal", f"cross-conformal, {FOLDS} folds"

Scores = NDArray[np.float64]
Threshold = Callable[
    [Scores, Scores], float
]  # of nominal scores, and of half of the defective ones


@dataclass(frozen=True)
class Split:
    """Scores by a model that was fitted on other images."""

    calibration: Scores
    test: Scores
    defective: Scores


class Embedded:
    """Images of a category as embeddings, for each member of a model."""

    def __init__(self, data: Path, settings: Settings) -> None:
        (category,) = find_categories(data)
        good = [*category.train, *(s.path for s in category.test if not s.is_anomalous)]
        bad = [sample.path for sample in category.test if sample.is_anomalous]
        ((name, weights),) = settings.networks
        network = shared_backbone(
            *(name, settings.layers, weights, torch.float32, False, torch.device("cpu")),
            settings.levels_of_maps,
        )
        self.settings = settings
        self.network = network
        self.members = members_of(settings, [network])
        self.good, self.bad = (self._embedded(paths, network) for paths in (good, bad))

    def _embedded(self, paths: Sequence[Path], network: Backbone) -> list[Tensor]:
        source = ImageSource(paths, image_size=self.settings.size, batch_size=BATCH)
        batches = [
            embeddings(self.members, [network], [levels_in_parts(network, batch.images)])
            for batch in source.batches()
        ]
        return [torch.cat(of_member) for of_member in zip(*batches, strict=True)]

    def split(self, seed: int) -> Split:
        """Fit some of the nominal images and score all others."""
        fitted, chosen, tested = self._parts(seed)
        fit = Fit(self.settings, self.members)
        for part in in_batches(fitted):
            fit.update([x[part] for x in self.good])
        scorer = Scorer([], fit.finalize(last=True), self.settings)
        return Split(
            scores(scorer, [x[chosen] for x in self.good]),
            scores(scorer, [x[tested] for x in self.good]),
            scores(scorer, self.bad),
        )

    def crossed(self, seed: int) -> Split:
        """Fit what `split` fits and what it chooses a threshold on, and calibrate on both."""
        fitted, chosen, tested = self._parts(seed)
        fit = Fit(self.settings, self.members)
        with CrossCalibration(fit, [self.network]) as folds:
            for part in in_batches(np.concatenate([fitted, chosen])):
                embedded = [x[part] for x in self.good]
                fit.update(embedded)
                folds.update(embedded)
            learned = fit.finalize(last=True)
            nominal = folds.finish(learned)
        scorer = Scorer([], learned, self.settings)
        return Split(
            nominal.scores,
            scores(scorer, [x[tested] for x in self.good]),
            scores(scorer, self.bad),
        )

    def _parts(self, seed: int) -> list[NDArray[np.int64]]:
        """Of the nominal images: to fit, to choose a threshold, and to test it."""
        order = np.random.default_rng([seed, self.settings.seed]).permutation(len(self.good[0]))
        n_fitted, n_chosen = (int(share * len(order)) for share in (FITTED, CALIBRATED))
        return np.split(order, [n_fitted, n_fitted + n_chosen])


def in_batches(order: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    return np.split(order, range(BATCH, len(order), BATCH))


def scores(scorer: Scorer, parts: Sequence[Tensor]) -> Scores:
    batches = zip(*(x.split(BATCH) for x in parts), strict=True)
    return torch.cat([scorer.score(batch)[0] for batch in batches]).double().numpy()


def conformals(n: int, name: str) -> Iterator[tuple[float, str, Threshold, int | None]]:
    """Rate that is asked for, name, how to choose it, and its rank from the highest of n scores."""
    for rate in RATES:
        for confidence in (None, CONFIDENCE):
            if n >= images_needed(rate, confidence):
                sure = f", confidence {confidence}" if confidence else ""
                choose = partial(conformal, rate=rate, confidence=confidence)
                # Of the scores 1, ..., n it chooses n + 1 - k.
                ranks = np.arange(1.0, n + 1)
                yield rate, name + sure, choose, n + 1 - round(choose(ranks, ranks))


def others() -> Iterator[tuple[float, str, Threshold, int | None]]:
    """As `conformals`, of thresholds that promise nothing."""
    for rate in RATES:
        sigmas = stats.norm.isf(rate)
        yield rate, f"mean + {sigmas:.2f} sd", partial(gaussian, sigmas=sigmas), None
    yield float(stats.norm.sf(3)), "mean + 3 sd", partial(gaussian, sigmas=3.0), None
    yield math.nan, "highest score", lambda good, _: float(good.max()), None
    yield math.nan, "best F1, shown half of the defects", f1, None


def conformal(good: Scores, _: Scores, rate: float, confidence: float | None) -> float:
    return Calibration(good).threshold(rate, confidence)


def gaussian(good: Scores, _: Scores, sigmas: float) -> float:
    return float(good.mean() + sigmas * good.std(ddof=1))


def f1(good: Scores, bad: Scores) -> float:
    """Alarms are the scores that reach it, and here those above: the next number below."""
    labels = np.repeat([False, True], [len(good), len(bad)])
    return float(np.nextafter(best_f1(labels, np.concatenate([good, bad]))[1], -np.inf))


def measured(
    splits: Sequence[Split], thresholds: Iterable[tuple[float, str, Threshold, int | None]]
) -> Iterator[dict[str, Any]]:
    """A row for each threshold."""
    n, n_test = len(splits[0].calibration), len(splits[0].test)
    for rate, name, choose, k in thresholds:
        alarms, found = np.empty(len(splits)), np.empty(len(splits))
        for i, split in enumerate(splits):
            bad = np.random.default_rng(i).permutation(split.defective)
            shown, hidden = np.array_split(bad, 2)
            threshold = choose(split.calibration, shown)
            alarms[i] = (split.test > threshold).mean()
            found[i] = (hidden > threshold).mean()
        # As splits are drawn from one set of images, this is the error of their finite number alone.
        error = stats.norm.isf(0.005) * alarms.std(ddof=1) / math.sqrt(len(splits))
        asked = not math.isnan(rate)
        law = None if k is None or not asked else stats.betabinom(n_test, k, n + 1 - k)
        yield {
            "rate": rate if asked else None,
            "threshold": name,
            "calibrated": n,
            "tested": n_test,
            "false_alarms": alarms.mean(),
            "false_alarms_expected": None if k is None else k / (n + 1),
            "interval": [alarms.mean() - error, alarms.mean() + error],
            "splits_over": (alarms > rate).mean() if asked else None,
            "splits_over_expected": law and float(law.sf(math.floor(round(rate * n_test, 9)))),
            "found": found.mean(),
        }


def table(name: str, rows: Sequence[dict[str, Any]]) -> str:
    heads = [f"{name}: asked for", "threshold", "false alarms, 99 % interval", "expected"]
    heads += ["splits above", "expected", "defective found"]
    lines = []
    for row in rows:
        low, high = row["interval"]
        lines.append(
            [
                "" if row["rate"] is None else f"{100 * row['rate']:.3g} %",
                row["threshold"],
                f"{100 * row['false_alarms']:.2f} % ({100 * low:.2f}, {100 * high:.2f})",
                percent(row["false_alarms_expected"], 2),
                percent(row["splits_over"]),
                percent(row["splits_over_expected"]),
                percent(row["found"]),
            ]
        )
    return markdown_table(heads, lines)


def percent(share: float | None, digits: int = 1) -> str:
    return "" if share is None else f"{100 * share:.{digits}f} %"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("data", nargs="+", type=Path, help="MVTec AD categories")
    add("--network", default="filterbank", metavar="NAME[=FILE]")
    add("--image-size", type=int, default=128)
    add("--n-centroids", type=int, default=1024)
    add("--splits", type=int, default=50)
    add("--seed", type=int, default=0, help="of the fits, and of all that is shuffled")
    add("--threads", type=int, default=1)
    add("--out", type=Path, required=True, help="folder of the results")
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    network, _, weights = args.network.partition("=")
    settings = Settings(
        backbone=network,
        weights=weights or None,
        image_size=args.image_size,
        n_centroids=args.n_centroids,
        seed=args.seed,
        calibration_folds=FOLDS,
        false_alarm_rate=0.5,  # so that none is refused; each row asks for its own
        progress=False,
    )
    for data in args.data:
        name = data.resolve().name
        embedded = Embedded(data, settings)
        splits = [embedded.split(i) for i in range(args.splits)]
        rows = list(measured(splits, [*conformals(len(splits[0].calibration), SPLIT), *others()]))
        crossed = [embedded.crossed(i) for i in range(args.splits)]
        rows += measured(crossed, conformals(len(crossed[0].calibration), CROSSED))
        rows.sort(key=lambda row: math.inf if row["rate"] is None else row["rate"])
        report = {
            "provenance": provenance(),
            "data": name,
            "settings": settings.to_json() | {"weights": None},
            "fitted": int(FITTED * len(embedded.good[0])),
            "folds": FOLDS,
            "rows": rows,
        }
        file = args.out / f"study_calibration_{name}.json"
        file.write_text(json.dumps(report, indent=1) + "\n")
        print(table(name, rows), flush=True)


if __name__ == "__main__":
    main()
