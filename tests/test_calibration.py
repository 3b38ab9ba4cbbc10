"""p-values, thresholds and the drift monitor: against their definitions, and what they promise."""

from __future__ import annotations

import json
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from npad import calibration
from npad.calibration import (
    Calibration,
    DriftMonitor,
    GroupedCalibration,
    UnknownGroupError,
    images_needed,
    rate_interval,
)

NOT_SHARES = [0, 1, -0.1, 1.5, float("nan"), float("inf"), "0.1", None, True, 1e-300]

few_values = st.lists(st.integers(0, 5).map(float), min_size=1, max_size=40)  # so that many tie
rates = st.one_of(st.floats(0.01, 0.99), st.integers(1, 99).map(lambda n: n / 100), st.just(1 / 3))


# --- p-values and thresholds ---


@given(few_values, few_values)
@settings(max_examples=50, deadline=None)
def test_p_values_are_counted(known: list[float], scores: list[float]) -> None:
    expected = [(1 + sum(k >= s for k in known)) / (len(known) + 1) for s in scores]
    assert Calibration(known).p_values(scores).tolist() == expected


@given(few_values, few_values, rates)
@settings(max_examples=200, deadline=None)
def test_an_alarm_is_a_p_value_of_at_most_the_rate(
    known: list[float], scores: list[float], rate: float
) -> None:
    found = Calibration(known)
    alarms = found.p_values(scores) <= rate
    if len(known) < images_needed(rate):
        assert not alarms.any()
        with pytest.raises(ValueError, match=f"needs {images_needed(rate)} nominal"):
            found.threshold(rate)
    else:
        np.testing.assert_array_equal(np.array(scores) > found.threshold(rate), alarms)


@pytest.mark.parametrize("n", [1, 9, 12, 99, 199, 1234])
def test_the_rank_is_that_of_exact_arithmetic(n: int) -> None:
    known = Calibration(np.arange(n))
    for percent in range(1, 100):
        k = (
            Fraction(percent, 100) * (n + 1) // 1
        )  # 0.29 * 100 is less than 29 as numbers are stored
        if k:
            assert known.threshold(percent / 100) == n - k


@pytest.mark.parametrize("confidence", [0.05, 0.5, 0.95, 0.999])
@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5])
def test_with_a_confidence_the_rank_is_the_largest_that_keeps_it(
    rate: float, confidence: float
) -> None:
    least = images_needed(rate, confidence)
    for n in (least, least + 1, least + 500):
        enough = stats.binom.sf(np.arange(n), n, rate) >= confidence  # P(X >= k), k = 1, ..., n
        k = n - Calibration(np.arange(n)).threshold(rate, confidence)
        assert k == np.count_nonzero(enough)
    assert least == 1 or stats.binom.sf(0, least - 1, rate) < confidence


@pytest.mark.parametrize(
    ("rate", "confidence", "n"),
    [
        (0.01, None, 99),
        (0.01, 0.95, 299),
        (0.001, None, 999),
        (1 / 3, None, 2),
        (0.9, None, 1),
        (0.99, 0.5, 1),
        (1e-9, None, 999_999_999),
        (np.float64(0.05), 0.99, 90),
    ],
)
def test_images_needed(rate: float, confidence: float | None, n: int) -> None:
    assert images_needed(rate, confidence) == n
    if 1 < n < 1000:
        Calibration(np.arange(n)).threshold(rate, confidence)
        with pytest.raises(
            ValueError, match=f"needs {n} nominal images .* got {n - 1}; score more"
        ):
            Calibration(np.arange(n - 1)).threshold(rate, confidence)


def test_the_rate_is_kept_on_average_and_with_the_confidence() -> None:
    rng = np.random.default_rng(0)
    n, rate, runs = 399, 0.05, 2000
    known = [Calibration(scores) for scores in rng.random((runs, n))]  # rates are 1 - threshold
    actual = 1 - np.array([one.threshold(rate) for one in known])
    assert abs(actual.mean() - rate) < 4 * actual.std() / runs**0.5
    actual = 1 - np.array([one.threshold(rate, 0.9) for one in known])
    k = n - Calibration(np.arange(n)).threshold(rate, 0.9)
    over = stats.beta.sf(rate, k, n + 1 - k)
    assert 0.05 < over <= 0.1
    assert abs((actual > rate).mean() - over) < 4 * (over / runs) ** 0.5


def test_scores_are_kept_sorted_and_are_not_those_of_the_caller() -> None:
    given_scores = np.array([3, 1, 2], dtype=np.float32)
    known = Calibration(given_scores)
    given_scores[:] = 0
    assert known.scores.tolist() == [1, 2, 3]
    assert known.scores.dtype == np.float64
    with pytest.raises(ValueError, match="read-only"):
        known.scores[0] = 7
    assert known.p_values([]).shape == (0,)


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        ([1.0, float("nan")], "score 1 is nan"),
        ([float("inf")], "score 0 is inf"),
        ([[1.0], [2.0]], r"one number for each image, \(N,\), got shape \(2, 1\)"),
        ([[1.0], [2.0, 3.0]], "one number for each image"),
        (1.0, r"got shape \(\)"),
        (["1.0"], "must be numbers"),
        ([True], "must be numbers, got bool"),
        ([1j], "must be numbers"),
        ([None], "must be numbers"),
    ],
)
def test_scores_that_are_none_are_refused(scores: Any, said: str) -> None:
    known = Calibration([1.0, 2.0])
    monitor = DriftMonitor(known)
    before = monitor.state()
    for name, take in (
        ("Calibration", Calibration),
        ("Calibration.p_values", known.p_values),
        ("DriftMonitor.update", monitor.update),
    ):
        with pytest.raises(ValueError, match=f"^{name}: .*{said}"):
            take(scores)
    assert monitor.state() == before


def test_no_scores_are_no_calibration() -> None:
    with pytest.raises(ValueError, match="scores is empty; score at least one nominal image"):
        Calibration([])


@pytest.mark.parametrize("value", NOT_SHARES)
def test_rates_and_confidences_that_are_none_are_refused(value: Any) -> None:
    known = Calibration(np.arange(500))
    said = r"must be a number from 1e-09 to below 1, got"
    for take in (known.threshold, images_needed, lambda rate: DriftMonitor(known, rate)):
        with pytest.raises(ValueError, match=said):
            take(value)
    if value is not None:
        with pytest.raises(ValueError, match=f"confidence {said}"):
            known.threshold(0.1, value)
    with pytest.raises(ValueError, match=f"confidence {said}"):
        rate_interval(1, 2, value)


# --- groups ---


@pytest.mark.parametrize("kind", [list, np.array])
def test_each_group_is_judged_by_its_own(kind: Any) -> None:
    rng = np.random.default_rng(0)
    groups = rng.choice(["a", "b", "c"], 400)
    scores = rng.normal(size=400) + 10 * (groups == "b")
    known = GroupedCalibration(scores[:300], kind(groups[:300]))
    new, of = scores[300:], groups[300:]
    p, thresholds = known.p_values(new, kind(of)), known.thresholds(kind(of), 0.05)
    np.testing.assert_array_equal(new > thresholds, p <= 0.05)
    for group in "abc":
        alone = Calibration(scores[:300][groups[:300] == group])
        np.testing.assert_array_equal(p[of == group], alone.p_values(new[of == group]))
        np.testing.assert_array_equal(thresholds[of == group], alone.threshold(0.05))
    assert sorted(known.calibrations) == ["a", "b", "c"]


def test_groups_with_too_few_images_are_named_with_what_they_need() -> None:
    known = GroupedCalibration(np.arange(150.0), ["day"] * 100 + ["night"] * 50)
    assert known.thresholds(["day"]).tolist() == [99.0]
    with pytest.raises(ValueError, match=r"rate of 0.01 needs 99 .* 'night' lacks 49 of") as error:
        known.thresholds(list(known.calibrations))
    assert "day" not in str(error.value)


def test_unknown_groups_are_named() -> None:
    known = GroupedCalibration([1.0, 2.0], ["a", 7])
    with pytest.raises(UnknownGroupError, match=r"no group 'c'.*There are 'a', 7") as error:
        known.p_values([1.0], ["c"])
    assert error.value.group == "c"
    with pytest.raises(UnknownGroupError):
        known.thresholds(["a", "c"], 0.5)


@pytest.mark.parametrize("groups", [[], ["a"], ["a", "b", "c"], "ab"])
def test_there_is_one_group_for_each_score(groups: Any) -> None:
    with pytest.raises(ValueError, match="GroupedCalibration: groups must be a list of one"):
        GroupedCalibration([1.0, 2.0], groups)
    with pytest.raises(ValueError, match="p_values: groups must be a list of one"):
        GroupedCalibration([1.0, 2.0], ["a", "b"]).p_values([1.0, 2.0], groups)


# --- intervals ---


def test_the_interval_holds_the_rate_with_its_confidence_whatever_the_rate() -> None:
    n, confidence = 20, 0.9
    intervals = np.array([rate_interval(count, n, confidence) for count in range(n + 1)])
    for rate in np.linspace(0.01, 0.99, 99):
        holds = (intervals[:, 0] <= rate) & (rate <= intervals[:, 1])
        assert stats.binom.pmf(np.arange(n + 1), n, rate)[holds].sum() >= confidence
    expected = stats.binomtest(3, n).proportion_ci(confidence)
    np.testing.assert_allclose(intervals[3], [expected.low, expected.high])
    assert intervals[0, 0] == 0
    assert intervals[n, 1] == 1


@pytest.mark.parametrize(("count", "n"), [(0, 0), (-1, 5), (6, 5), (1.0, 5), (1, "5"), (True, 5)])
def test_counts_that_are_none_are_refused(count: Any, n: Any) -> None:
    with pytest.raises(ValueError, match="rate_interval: count and n must be whole numbers"):
        rate_interval(count, n)


# --- drift ---


def watch(known: Any, stream: Any, **more: Any) -> DriftMonitor:
    monitor = DriftMonitor(Calibration(known), **more)
    monitor.update(stream)
    return monitor


def test_bets_are_fair() -> None:
    """Integrated piece by piece, as they have poles at 0, 1/2 and 1."""
    for bet in range(len(calibration._log_gains(0.5))):
        gain = sum(
            integrate.quad(lambda u: np.exp(calibration._log_gains(u)[bet]), low, low + 0.25)[0]  # noqa: B023
            for low in (0, 0.25, 0.5, 0.75)
        )
        assert 0.98 < gain <= 1 + 1e-6


def test_stakes_never_add_to_more_than_there_is() -> None:
    stakes = [calibration._N_BETS * np.exp(calibration._log_stake(t)) for t in range(1000)]
    np.testing.assert_allclose(
        np.cumsum(stakes) + [calibration._left(t + 1) for t in range(1000)], 1
    )
    assert DriftMonitor(Calibration([1.0])).martingale == pytest.approx(0)


def test_ranks_are_uniform_and_independent_with_ties(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks: list[float] = []
    gains = calibration._log_gains
    monkeypatch.setattr(calibration, "_log_gains", lambda u: ranks.append(u) or gains(u))
    rng = np.random.default_rng(0)
    for seed in range(100):
        watch(rng.integers(0, 3, 5), rng.integers(0, 3, 20), seed=seed)
    assert stats.kstest(ranks, "uniform").pvalue > 0.01
    pairs = np.array(ranks).reshape(100, 20)
    correlation = np.corrcoef(pairs[:, :-1].ravel(), pairs[:, 1:].ravel())[0, 1]
    assert abs(correlation) < 3 / len(ranks) ** 0.5


def test_the_monitor_is_quiet_while_nothing_changes() -> None:
    rng = np.random.default_rng(0)
    runs, bound = 60, 0.2
    raised = sum(
        watch(
            rng.exponential(size=30), rng.exponential(size=100), false_alarm_bound=bound, seed=i
        ).raised_at
        is not None
        for i in range(runs)
    )
    assert stats.binom.sf(raised - 1, runs, bound) > 0.01
    assert raised > 0  # it is no monitor that never is


CHANGES = {
    "shift up": (lambda z: z + 2, 40),
    "shift down": (lambda z: z - 2, 40),
    "spread": (lambda z: 3 * z, 60),
    "gathering": (lambda z: z / 4, 150),
    "ramp": (lambda z: z + np.arange(len(z)) / 50, 150),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_raises_it(change: str) -> None:
    changed, within = CHANGES[change]
    for seed in range(3):
        z = np.random.default_rng(seed).normal(size=700)
        stream = np.concatenate([z[200:400], changed(z[400:])])
        monitor = watch(z[:200], stream)
        assert monitor.raised_at is not None
        assert 200 < monitor.raised_at <= 200 + within


def test_once_raised_it_stays_raised_and_does_not_overflow() -> None:
    monitor = DriftMonitor(Calibration(np.arange(50)), 0.001)
    assert monitor.martingale == pytest.approx(0)
    assert not monitor.update([])
    assert monitor.update(np.arange(100, 2000))
    raised_at = monitor.raised_at
    assert monitor.martingale > 308  # more than a float holds
    assert monitor.update(np.full(10, 25.0))
    assert monitor.raised_at == raised_at


def test_its_state_survives_json_at_any_point() -> None:
    rng = np.random.default_rng(0)
    known, stream = rng.integers(0, 20, 30) / 7, rng.integers(0, 60, 60) / 7  # with ties
    whole = watch(known, stream, seed=2**64 - 1)
    assert whole.raised_at is not None
    for cut in (0, 1, whole.raised_at - 1, whole.raised_at, 60):
        monitor = watch(known, stream[:cut], seed=2**64 - 1)
        text = json.dumps(monitor.state(), allow_nan=False)
        again = DriftMonitor.from_state(json.loads(text))
        for score in stream[cut:]:  # and one at a time is as all at once
            again.update([score])
        assert again.state() == whole.state()
        assert again.martingale == whole.martingale
    assert watch(known, stream, seed=1).martingale != whole.martingale


def test_what_is_no_state_is_refused() -> None:
    state = DriftMonitor(Calibration([1.0])).state()
    for key in state:
        with pytest.raises(ValueError, match=f"the state has no '{key}'"):
            DriftMonitor.from_state({k: v for k, v in state.items() if k != key})
    for other in (None, [], "state", 3):
        with pytest.raises(ValueError, match="from_state: state must be a dict, got"):
            DriftMonitor.from_state(other)


NO_STATES = {
    "log_bets must be 12 numbers, got 1": {"log_bets": [0.0]},
    "log_bets: score 11 is inf": {"log_bets": [0.0] * 11 + [np.inf]},
    "log_bets: scores must be numbers": {"log_bets": ["0"] * 12},
    "from_state: scores: scores must be numbers": {"scores": ["1", "2"]},
    "from_state: scores: score 1 is nan": {"scores": [1.0, np.nan]},
    "scores is empty": {"scores": []},
    "false_alarm_bound must be": {"false_alarm_bound": 2},
    "seed must be": {"seed": 0.5},
    "n_seen must be a whole number from 0 to 5.*got 6": {"n_seen": 6},
    "n_seen must be.*got -1": {"n_seen": -1},
    "n_seen must be.*got 1.0": {"n_seen": 1.0},
    "n_seen must be.*got True": {"n_seen": True},
    "n_seen must be.*got None": {"n_seen": None},
    "raised_at must be None or a whole number from 1 to n_seen = 3, got 4": {"raised_at": 4},
    "raised_at must be.*got 0": {"raised_at": 0},
    "raised_at must be.*got '1'": {"raised_at": "1"},
    "raised_at must be.*got False": {"raised_at": False},
    "raised_at is None, and the evidence is 4.34": {"log_bets": [10 - np.log(12)] * 12},
}


@pytest.mark.parametrize("says", NO_STATES)
def test_states_with_nonsense_are_refused_by_name(says: str) -> None:
    state = watch([1.0, 2.0, 3.0], [1.5, 2.5, 0.5]).state()
    assert DriftMonitor.from_state(state).n_seen == 3
    with pytest.raises(ValueError, match=says):
        DriftMonitor.from_state(state | NO_STATES[says])


def test_a_monitor_is_raised_as_soon_as_its_evidence_is_enough() -> None:
    """So that every state of a monitor is one that `from_state` takes."""
    z = np.random.default_rng(0).normal(size=400)
    monitor = DriftMonitor(Calibration(z[:100]), 0.3)
    for score in z[100:] + np.arange(300) / 50:
        before = monitor.martingale
        if monitor.update([score]):
            break
    assert before < -np.log10(0.3) <= monitor.martingale


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, "0", True, None])
def test_seeds_that_are_none_are_refused(seed: Any) -> None:
    with pytest.raises(ValueError, match="DriftMonitor: seed must be a whole number"):
        DriftMonitor(Calibration([1.0]), seed=seed)
