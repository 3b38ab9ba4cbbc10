"""What the thresholds of a calibrated model gave on test images, and how sure that is."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from scipy.special import kolmogi

from npad.calibration import rate_interval
from npad.evaluation.datasets import GOOD
from npad.nominal_scores import NominalScores

__all__ = ["BINS", "Calibrated", "Decision", "Flatness", "Share", "judge"]

BINS = 10  # of the histogram of p-values
_LEVEL = 0.05  # at which p-values are called not flat
_COARSEST = 0.4  # a test that only notices larger distances than this tells nothing


@dataclass(frozen=True)
class Decision:
    """What a calibrated model decided about one image.

    Attributes
    ----------
    p_value : see `npad.calibration.Calibration.p_values`
    threshold : above which a score is an alarm
    anomalous : whether that of the image is
    map_maximum : the largest value of the anomaly map at the model's size
    map_threshold : above which a pixel is marked
    """

    p_value: float
    threshold: float
    anomalous: bool
    map_maximum: float
    map_threshold: float

    @property
    def is_marked(self) -> bool:
        """Whether any pixel is marked."""
        return self.map_maximum > self.map_threshold


@dataclass(frozen=True)
class Share:
    """Images of a kind, `count` of `of`."""

    count: int
    of: int

    @property
    def rate(self) -> float:
        """The share as a number; NaN of no images."""
        return self.count / self.of if self.of else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Exact 95 % interval of the rate, see `npad.calibration.rate_interval`; NaN of no images."""
        return rate_interval(self.count, self.of) if self.of else (math.nan, math.nan)

    def to_json(self) -> dict[str, Any]:
        """The count, the rate and its interval, as JSON types; NaN stays."""
        return vars(self) | {"rate": self.rate, "interval": list(self.interval)}


@dataclass(frozen=True, eq=False)
class Flatness:
    """Whether p-values of nominal test images are spread as those of nominal images are: evenly.

    Attributes
    ----------
    counts : (`BINS`,) int64, images whose p-value is in (0, 0.1], (0.1, 0.2], ...
    expected : (`BINS`,) float64, as many as come on average where test images are as those of the
        calibration; all are equal where 1 / (n + 1) divides a bin, with n images in the calibration
    low, high : (`BINS`,) int64, between which each count then is with at least 95 %
    distance : the largest distance of the cumulative distributions of scores, of the calibration and of
        the test
    p_value : of such a distance or a larger one
    noticed : the distance from which on the p-value is below 0.05

    Notes
    -----
    A count has a beta-binomial distribution, as the test images and those of the calibration are both
    samples. The p-value is that of the two-sample test of Kolmogorov and Smirnov, which knows ranks
    only, as p-values do. It is exact up to some thousand images. Both are for scores without ties: with
    ties, p-values are larger than evenly spread ones.
    """

    counts: NDArray[np.int64]
    expected: NDArray[np.float64]
    low: NDArray[np.int64]
    high: NDArray[np.int64]
    distance: float
    p_value: float
    noticed: float

    @property
    def verdict(self) -> str:
        """``"flat"``, ``"not flat"``, or ``"too few"`` images to tell."""
        if self.noticed > _COARSEST:
            return "too few"
        return "not flat" if self.p_value < _LEVEL else "flat"

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON types."""
        return {name: _json(value) for name, value in vars(self).items()} | {
            "verdict": self.verdict
        }


@dataclass(frozen=True, eq=False)
class Calibrated:
    """What the thresholds of a calibrated model gave on test images.

    Attributes
    ----------
    false_alarm_rate, confidence : what was asked for
    n_nominal, n_groups : images of the calibration, and groups of them; 0 where there are none
    thresholds, map_thresholds : of scores and of maps, ascending; more than one where groups have
        their own
    false_alarms : good images whose score is above the threshold
    missed : defective images whose score is not
    missed_by_type : the same for each type of defect
    marked : good images of which any pixel is marked
    unmarked : defective images of which none is
    unmarked_by_type : the same for each type of defect
    p_values : (n_good,) float64, of the good images
    flatness : of these p-values; None without good images, and where there are groups, each of which
        would need a test of its own
    """

    false_alarm_rate: float
    confidence: float | None
    n_nominal: int
    n_groups: int
    thresholds: tuple[float, ...]
    map_thresholds: tuple[float, ...]
    false_alarms: Share
    missed: Share
    missed_by_type: dict[str, Share]
    marked: Share
    unmarked: Share
    unmarked_by_type: dict[str, Share]
    p_values: NDArray[np.float64]
    flatness: Flatness | None

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON types, each share with its interval; NaN stays."""
        return {name: _json(value) for name, value in vars(self).items()}


def _json(value: Any) -> Any:
    if isinstance(value, Share | Flatness):
        return value.to_json()
    if isinstance(value, dict):
        return {name: _json(of_name) for name, of_name in value.items()}
    return value.tolist() if isinstance(value, np.ndarray) else value


def judge(
    kinds: Sequence[str],
    scores: Sequence[float],
    decisions: Sequence[Decision],
    calibration: NominalScores,
    false_alarm_rate: float,
    confidence: float | None,
) -> Calibrated:
    """Count what a calibrated model decided rightly and wrongly.

    Parameters
    ----------
    kinds : the type of each of N images, ``"good"`` or one of defects
    scores, decisions : of each image
    calibration : what the decisions rest on
    false_alarm_rate, confidence : for which the thresholds were chosen
    """
    of = np.array(kinds)
    good = of == GOOD
    alarms = np.array([decision.anomalous for decision in decisions])
    marked = np.array([decision.is_marked for decision in decisions])
    p_values = np.array([decision.p_value for decision in decisions])[good]
    types = sorted(set(of[~good].tolist()))

    def share(what: NDArray[np.bool_], chosen: NDArray[np.bool_]) -> Share:
        return Share(int(what[chosen].sum()), int(chosen.sum()))

    return Calibrated(
        false_alarm_rate,
        confidence,
        len(calibration.scores),
        len(set(calibration.groups or ())),
        tuple(sorted({decision.threshold for decision in decisions})),
        tuple(sorted({decision.map_threshold for decision in decisions})),
        share(alarms, good),
        share(~alarms, ~good),
        {kind: share(~alarms, of == kind) for kind in types},
        share(marked, good),
        share(~marked, ~good),
        {kind: share(~marked, of == kind) for kind in types},
        p_values,
        _flatness(p_values, np.array(scores)[good], calibration.scores)
        if good.any() and calibration.groups is None
        else None,
    )


def _flatness(
    p_values: NDArray[np.float64], scores: NDArray[np.float64], nominal: NDArray[np.float64]
) -> Flatness:
    n_test, n = len(scores), len(nominal)
    possible = _binned(np.arange(1, n + 2) / (n + 1))  # p-values that there are, in each bin
    a, b = np.maximum(possible, 1), n + 1 - possible
    low, high = (stats.betabinom.ppf(q, n_test, a, b) * (possible > 0) for q in (0.025, 0.975))
    with warnings.catch_warnings():  # of many images it takes the asymptotic law
        warnings.filterwarnings("ignore", "ks_2samp: Exact calculation unsuccessful")
        test = stats.ks_2samp(nominal, scores)
    return Flatness(
        _binned(p_values),
        n_test * possible / (n + 1),
        low.astype(np.int64),
        high.astype(np.int64),
        float(test.statistic),
        float(test.pvalue),
        float(kolmogi(_LEVEL)) * math.sqrt((n + n_test) / (n * n_test)),
    )


def _binned(p_values: NDArray[np.float64]) -> NDArray[np.int64]:
    """How many are in (0, 0.1], (0.1, 0.2], ..., rounded as they are."""
    bins = np.ceil(p_values * BINS - 1e-9).astype(np.int64) - 1
    return np.bincount(bins, minlength=BINS)
