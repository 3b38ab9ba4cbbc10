"""Decisions from scores alone: p-values, thresholds with a stated rate of false alarms, drift.

No defect is needed, only the scores of some nominal images that the model was not fitted on. What is
promised here holds for every model and every distribution of scores, as long as the images to come are
exchangeable with those of the calibration: nominal, of the same parts, camera and light, in no order
that matters.

Sources: Vovk, Gammerman, Shafer, *Algorithmic Learning in a Random World*, Springer 2005; Vovk,
*Conditional validity of inductive conformal predictors*, ACML 2012; Bates, Candès, Lei, Romano, Sesia,
*Testing for outliers with conformal p-values*, Annals of Statistics 51 (2023).
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import betainc, betaincinv

from npad.settings import LEAST_RATE

__all__ = [
    "Calibration",
    "DriftMonitor",
    "GroupedCalibration",
    "UnknownGroupError",
    "images_needed",
    "rate_interval",
]


@dataclass(frozen=True, eq=False)
class Calibration:
    """Scores of nominal images that the model was not fitted on, against which others are judged.

    Parameters
    ----------
    scores : (n,) float, finite, at least one, such as ``model.predict(images).scores``. They belong to
        the model that gave them: after another fit, score the images again.

    Attributes
    ----------
    scores : (n,) float64, ascending, read-only

    Raises
    ------
    ValueError
        The scores are not such.
    """

    scores: NDArray[np.float64]

    def __post_init__(self) -> None:
        scores = np.sort(_scores("Calibration", self.scores))
        if not len(scores):
            raise ValueError(
                "Calibration: scores is empty; score at least one nominal image that was not fitted"
            )
        scores.flags.writeable = False
        object.__setattr__(self, "scores", scores)

    def p_values(self, scores: ArrayLike) -> NDArray[np.float64]:
        """How rare such a score is among nominal images.

        Parameters
        ----------
        scores : (N,) float, finite, of the same model

        Returns
        -------
        (N,) float64, multiples of 1 / (n + 1)

        Raises
        ------
        ValueError
            Scores of another form; NaN, which no p-value would be safe for.

        Notes
        -----
        p = (1 + #{i: s_i >= s}) / (n + 1). For a nominal image P(p <= rate) is at most the rate, over
        the images of the calibration and the new one. Source: Vovk, Gammerman, Shafer 2005.
        """
        below = np.searchsorted(self.scores, _scores("Calibration.p_values", scores), "left")
        n = len(self.scores)
        return (1 + n - below) / (n + 1)

    def threshold(self, false_alarm_rate: float = 0.01, confidence: float | None = None) -> float:
        """The threshold above which a score is an alarm: ``score > threshold``.

        Parameters
        ----------
        false_alarm_rate : share of nominal images that may be alarms
        confidence : None keeps the rate on average over calibrations, and an alarm is then the same as
            ``p_values(scores) <= false_alarm_rate``. With a number, this very calibration keeps it with
            at least that probability; the threshold is then higher.

        Returns
        -------
        one of the calibration's scores

        Raises
        ------
        ValueError
            An argument that is no number between 0 and 1; too few images for it, with the number that
            is needed.

        Notes
        -----
        The k-th highest score. Without ties its rate of false alarms has the law Beta(k, n + 1 - k),
        and with ties it is lower. On average that is k / (n + 1), so k = floor(rate (n + 1)); with a
        confidence, k is the largest with P(Beta(k, n + 1 - k) <= rate) >= confidence. Sources: Vovk
        2012; Bates et al. 2023.
        """
        name = "Calibration.threshold"
        rate, confidence = _rates(name, false_alarm_rate, confidence)
        n = len(self.scores)
        k = _rank_of_threshold(n, rate, confidence)
        if not k:
            needed = images_needed(rate, confidence)
            raise ValueError(
                f"{name}: {_asked(rate, confidence)} needs {needed} nominal images that were not"
                f" fitted, got {n}; score more of them, or ask for less"
            )
        return float(self.scores[n - k])


class UnknownGroupError(ValueError):
    """An image of a group that the calibration has not seen.

    Attributes
    ----------
    group : the group
    """

    def __init__(self, group: Hashable, known: Iterable[Hashable]) -> None:
        super().__init__(group, tuple(known))
        self.group = group
        self.known = tuple(known)

    def __str__(self) -> str:
        return (
            f"GroupedCalibration: there is no group {self.group!r}; calibrate with nominal images of"
            f" it. There are {', '.join(map(repr, self.known))}"
        )


class GroupedCalibration:
    """A calibration for each group of images: lots, cameras, shifts.

    One rate over all images may hide a camera with many false alarms behind others with none; here the
    rate is kept in each group. Every group needs as many images as a `Calibration` does.

    Parameters
    ----------
    scores : (n,) float, as for `Calibration`
    groups : n names or numbers, the group of each score

    Attributes
    ----------
    calibrations : the calibration of each group, in the order in which groups were met

    Raises
    ------
    ValueError
        The scores are not such, or there is not one group for each.

    Notes
    -----
    Mondrian conformal prediction. Source: Vovk, Gammerman, Shafer 2005.
    """

    def __init__(self, scores: ArrayLike, groups: Sequence[Hashable]) -> None:
        found = _scores("GroupedCalibration", scores)
        rows = _rows("GroupedCalibration", groups, len(found))
        self.calibrations = {group: Calibration(found[own]) for group, own in rows.items()}

    def p_values(self, scores: ArrayLike, groups: Sequence[Hashable]) -> NDArray[np.float64]:
        """As `Calibration.p_values`, each score in its own group.

        Raises
        ------
        UnknownGroupError
            A group without a calibration.
        ValueError
            As for `Calibration.p_values`; not one group for each score.
        """
        found = _scores("GroupedCalibration.p_values", scores)
        p = np.empty(len(found))
        for group, rows in _rows("GroupedCalibration.p_values", groups, len(found)).items():
            p[rows] = self._of(group).p_values(found[rows])
        return p

    def thresholds(
        self,
        groups: Sequence[Hashable],
        false_alarm_rate: float = 0.01,
        confidence: float | None = None,
    ) -> NDArray[np.float64]:
        """As `Calibration.threshold`, for the group of each image: ``scores > thresholds(groups)``.

        Parameters
        ----------
        groups : (N,) the groups of the images; ``list(calibrations)`` for one of each
        false_alarm_rate, confidence : in each group, not over all of them

        Returns
        -------
        (N,) float64

        Raises
        ------
        UnknownGroupError
            A group without a calibration.
        ValueError
            As for `Calibration.threshold`: each group that has too few images, and what it needs.
        """
        name = "GroupedCalibration.thresholds"
        rate, confidence = _rates(name, false_alarm_rate, confidence)
        rows = _rows(name, groups, len(groups))
        sizes = {group: len(self._of(group).scores) for group in rows}
        needed = images_needed(rate, confidence)
        lacking = [f"{g!r} lacks {needed - n} of them" for g, n in sizes.items() if n < needed]
        if lacking:
            raise ValueError(
                f"{name}: {_asked(rate, confidence)} needs {needed} nominal images of each group that"
                f" were not fitted; {', '.join(lacking)}. Score more, or ask for less"
            )
        thresholds = np.empty(len(groups))
        for group, own in rows.items():
            thresholds[own] = self._of(group).threshold(rate, confidence)
        return thresholds

    def _of(self, group: Hashable) -> Calibration:
        if group not in self.calibrations:
            raise UnknownGroupError(group, self.calibrations)
        return self.calibrations[group]


class DriftMonitor:
    """Watches a stream of scores, and is raised when it has ceased to look like the calibration.

    Scores that rise, fall, spread out or draw together all count, and so does a share of defective
    parts. Where production has some, calibrate the monitor on images as they come, defective ones
    included; then only a change of their share is one.

    Parameters
    ----------
    calibration : scores from before the stream
    false_alarm_bound : while nothing changes, the monitor is ever raised with at most this probability,
        however long it runs
    seed : of the draws that break ties

    Attributes
    ----------
    n_seen : number of scores of the stream so far
    raised_at : ``n_seen`` when it was raised, or None. It stays raised: mend the cause, calibrate again
        and begin with another monitor.

    Raises
    ------
    ValueError
        A bound that is no number between 0 and 1; a seed that is no whole number from 0 to 2^64 - 1.

    Notes
    -----
    A conformal test martingale. Each score is ranked among the calibration and all of the stream before
    it, ties broken at random; while all are exchangeable, these ranks are independent and uniform.
    Against the calibration alone they would not be: all of them would share its chance. A gambler bets
    on small and large ranks and on outer and inner ones, with the densities e u^(e-1). His capital is a
    martingale that begins at 1, so that it ever reaches 1 / bound with at most the bound's probability
    (Ville's inequality). He puts a part of it on a change at each image to come: 1 / log2(t + 2) is
    left for those after image t. So after a quiet time, however long, he has to win back little more
    than that time's own size.

    Nothing is forgotten: 8 bytes for each score, and as a change goes on, it becomes what is usual.

    Sources: Vovk, Gammerman, Shafer 2005, chapter 7; Vovk et al., *Retrain or not retrain: conformal
    test martingales for change-point detection*, COPA 2021; Ville, *Étude critique de la notion de
    collectif*, 1939.
    """

    def __init__(
        self, calibration: Calibration, false_alarm_bound: float = 0.01, seed: int = 0
    ) -> None:
        self.false_alarm_bound = _share("DriftMonitor: false_alarm_bound", false_alarm_bound)
        if not _is_whole(seed) or not 0 <= seed < 2**64:
            raise ValueError(
                f"DriftMonitor: seed must be a whole number from 0 to 2^64 - 1, got {seed!r}"
            )
        self.seed = int(seed)
        self.n_seen = 0
        self.raised_at: int | None = None
        self._scores = array("d", calibration.scores)  # ascending
        self._log_bets = np.full(_N_BETS, _log_stake(0))

    def update(self, scores: ArrayLike) -> bool:
        """Look at the next scores, in the order of the stream; one at a time or many are the same.

        Parameters
        ----------
        scores : (N,) float, finite; none of them is taken in if one is not

        Returns
        -------
        whether the monitor is raised, by these scores or before

        Raises
        ------
        ValueError
            The scores are not such.
        """
        for score in _scores("DriftMonitor.update", scores).tolist():
            self._log_bets += _log_gains(self._rank(score))
            self.n_seen += 1
            self._log_bets = np.logaddexp(self._log_bets, _log_stake(self.n_seen))
            if self.raised_at is None and self.martingale >= self._limit:
                self.raised_at = self.n_seen
        return self.raised_at is not None

    @property
    def martingale(self) -> float:
        """Logarithm to base 10 of the capital: the evidence of a change, in powers of ten.

        It begins at 0 and falls slowly while nothing changes; at -log10(false_alarm_bound) the monitor
        is raised.
        """
        log_left = math.log(_left(self.n_seen + 1))
        return float(np.logaddexp.reduce([*self._log_bets, log_left])) / math.log(10)

    @property
    def _limit(self) -> float:
        return -math.log10(self.false_alarm_bound)

    def state(self) -> dict[str, Any]:
        """All that it knows, as JSON types: `from_state` goes on exactly from here."""
        return {
            "false_alarm_bound": self.false_alarm_bound,
            "seed": self.seed,
            "n_seen": self.n_seen,
            "raised_at": self.raised_at,
            "log_bets": self._log_bets.tolist(),
            "scores": self._scores.tolist(),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> DriftMonitor:
        """The monitor that `state` was taken from.

        Raises
        ------
        ValueError
            It is not the state of a monitor: what is wrong with it.
        """
        name = "DriftMonitor.from_state"
        if not isinstance(state, Mapping):
            raise ValueError(f"{name}: state must be a dict, got {type(state).__name__}")
        try:
            scores = Calibration(_scores(f"{name}: scores", state["scores"]))
            monitor = cls(scores, state["false_alarm_bound"], state["seed"])
            n_seen, raised_at = state["n_seen"], state["raised_at"]
            log_bets = _scores(f"{name}: log_bets", state["log_bets"])
        except KeyError as error:
            raise ValueError(f"{name}: the state has no {error}") from None
        if len(log_bets) != len(monitor._log_bets):
            raise ValueError(
                f"{name}: log_bets must be {len(monitor._log_bets)} numbers, got {len(log_bets)}; the "
                "state is another version's"
            )
        n = len(scores.scores)
        if not _is_whole(n_seen) or not 0 <= n_seen < n:
            raise ValueError(
                f"{name}: n_seen must be a whole number from 0 to {n - 1}, as there are {n} scores and "
                f"the calibration has one at least, got {n_seen!r}"
            )
        if raised_at is not None and not (_is_whole(raised_at) and 1 <= raised_at <= n_seen):
            raise ValueError(
                f"{name}: raised_at must be None or a whole number from 1 to n_seen = {n_seen}, got "
                f"{raised_at!r}"
            )
        monitor.n_seen, monitor._log_bets = n_seen, log_bets
        if raised_at is None and n_seen and monitor.martingale >= monitor._limit:
            raise ValueError(
                f"{name}: raised_at is None, and the evidence is {monitor.martingale:.3g}, at which "
                f"the monitor is raised (false_alarm_bound = {monitor.false_alarm_bound:g})"
            )
        monitor.raised_at = raised_at
        return monitor

    def _rank(self, score: float) -> float:
        """The share of scores up to now that are higher, uniform on (0, 1]; and take this one in."""
        low, high = bisect_left(self._scores, score), bisect_right(self._scores, score)
        higher = len(self._scores) - high
        self._scores.insert(high, score)
        # A number of its own for each image: no generator has to survive a restart.
        bits = np.random.Philox(key=self.seed, counter=self.n_seen).random_raw()
        among_ties = (int(bits >> 11) + 0.5) / 2**53
        return (higher + among_ties * (high - low + 1)) / len(self._scores)


# From bets on a few extreme ranks to bets on many mild ones.
_EXPONENTS: Final = np.array([[0.2], [0.5], [0.8]])
_N_BETS: Final = 4 * len(_EXPONENTS)


def _log_gains(rank: float) -> NDArray[np.float64]:
    """What each bet multiplies its stake by, as logarithms: densities of the rank."""
    outer = abs(2 * rank - 1)
    small = np.array([rank, 1 - rank, 1 - outer, outer])  # where scores rise, fall, spread, gather
    small = np.maximum(small, 1e-12)  # gains are never more than fair
    return (np.log(_EXPONENTS) + (_EXPONENTS - 1) * np.log(small)).ravel()


def _left(t: int) -> float:
    """The part of the capital that is kept for a change after image t, from 1 at 0."""
    return 1 / math.log2(t + 2)


def _log_stake(t: int) -> float:
    """What each bet gets, after t images, for a change at the next."""
    return math.log((_left(t) - _left(t + 1)) / _N_BETS)


def images_needed(false_alarm_rate: float, confidence: float | None = None) -> int:
    """Nominal images that `Calibration.threshold` needs at least.

    Raises
    ------
    ValueError
        An argument that is no number between 0 and 1.
    """
    rate, confidence = _rates("images_needed", false_alarm_rate, confidence)
    if confidence is None:
        n = round(1 / rate) - 1
    else:
        n = math.floor(math.log1p(-confidence) / math.log1p(-rate))
    n = max(n, 1)
    while not _rank_of_threshold(n, rate, confidence):  # at most once or twice: n is rounded
        n += 1
    return n


def rate_interval(count: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Exact interval of a rate of which `count` in `n` were seen: Clopper and Pearson's.

    Parameters
    ----------
    count : alarms, say
    n : independent images, at least one
    confidence : with at least this probability the interval holds the rate

    Returns
    -------
    least and greatest rate

    Raises
    ------
    ValueError
        Numbers that are not such.

    Notes
    -----
    Source: Clopper, Pearson, *The use of confidence or fiducial limits illustrated in the case of the
    binomial*, Biometrika 26 (1934).
    """
    if not (_is_whole(count) and _is_whole(n) and 0 <= count <= n and n):
        raise ValueError(
            "rate_interval: count and n must be whole numbers with 0 <= count <= n and n >= 1,"
            f" got {count!r} and {n!r}"
        )
    outside = (1 - _share("rate_interval: confidence", confidence)) / 2
    low = betaincinv(count, n - count + 1, outside) if count else 0.0
    high = betaincinv(count + 1, n - count, 1 - outside) if count < n else 1.0
    return float(low), float(high)


# --- arguments, and the rank of a threshold ---


def _rank_of_threshold(n: int, rate: float, confidence: float | None) -> int:
    """Of the threshold among n scores, from the highest, 1; 0 if they are too few."""
    if confidence is None:
        k = round(rate * (n + 1))
        return k - (k / (n + 1) > rate)  # as p-values are rounded: 0.29 of 100 is 29
    least = confidence
    # P(Beta(k, n + 1 - k) <= rate) falls with k: as many k have it as come before the first without.
    return bisect_left(
        range(1, n + 1), True, key=lambda k: bool(betainc(k, n + 1 - k, rate) < least)
    )


def _scores(name: str, values: ArrayLike) -> NDArray[np.float64]:
    try:
        found = np.asarray(values)
    except ValueError:  # rows of several lengths
        raise ValueError(f"{name}: scores must be one number for each image, (N,)") from None
    if found.ndim != 1:
        raise ValueError(
            f"{name}: scores must be one number for each image, (N,), got shape {found.shape}"
        )
    if found.dtype.kind not in "fiu":
        raise ValueError(f"{name}: scores must be numbers, got {found.dtype}")
    scores = found.astype(np.float64)
    if not np.isfinite(scores).all():
        i = int(np.argmin(np.isfinite(scores)))
        raise ValueError(
            f"{name}: score {i} is {scores[i]}; leave that image out, and look at what gave the score"
        )
    return scores


def _rows(name: str, groups: Sequence[Hashable], n: int) -> dict[Hashable, list[int]]:
    """Of each group, where its images are."""
    names = groups.tolist() if isinstance(groups, np.ndarray) else groups
    if isinstance(names, str) or len(names) != n:
        raise ValueError(
            f"{name}: groups must be a list of one for each of {n} scores, got {groups!r:.80}"
        )
    rows = defaultdict(list)
    for i, group in enumerate(names):
        rows[group].append(i)
    return dict(rows)


def _rates(
    name: str, false_alarm_rate: float, confidence: float | None
) -> tuple[float, float | None]:
    rate = _share(f"{name}: false_alarm_rate", false_alarm_rate)
    return rate, None if confidence is None else _share(f"{name}: confidence", confidence)


def _share(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not LEAST_RATE <= float(value) < 1:
        raise ValueError(f"{name} must be a number from {LEAST_RATE} to below 1, got {value!r}")
    return float(value)


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _asked(rate: float, confidence: float | None) -> str:
    sure = "" if confidence is None else f" with confidence {confidence:g}"
    return f"a false-alarm rate of {rate:g}{sure}"
