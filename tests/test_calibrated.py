"""What a calibrated model decided on test images: counts, intervals, whether p-values are flat."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
from fake_model import CalibratedModel, FakeModel, write_category
from scipy import stats

from npad.evaluation import measure, results
from npad.evaluation.calibrated import BINS, Decision, Share, judge
from npad.evaluation.datasets import find_categories
from npad.nominal_scores import NominalScores

TESTS = [
    *(("good", f"{i:03}", 0, 1) for i in range(9)),
    *(("dent", f"{i:03}", 40, 1) for i in range(3)),
    *(("scratch", f"{i:03}", 6 + i, 1) for i in range(4)),
]


@pytest.fixture(scope="module")
def category(tmp_path_factory):
    return find_categories(write_category(tmp_path_factory.mktemp("data") / "plate", TESTS))[0]


@pytest.fixture(scope="module")
def plain(category):
    """Of a model that is not calibrated."""
    return measure.evaluate(FakeModel(), category)


def scores_of(result, *kinds):
    return np.array([image.score for image in result.images if image.defect_type in kinds])


@pytest.mark.parametrize(("count", "of"), [(0, 1), (1, 1), (0, 57), (3, 190), (61, 392), (7, 7)])
def test_a_share_has_the_exact_interval(count, of):
    share = Share(count, of)
    exact = stats.binomtest(count, of).proportion_ci(0.95, method="exact")
    assert share.rate == count / of
    assert share.interval == pytest.approx((exact.low, exact.high), abs=1e-12)


def test_a_share_of_nothing_is_unknown():
    assert np.isnan([Share(0, 0).rate, *Share(0, 0).interval]).all()


def test_counts_are_those_of_the_scores(category, plain):
    good, dent, scratch = (scores_of(plain, kind) for kind in ("good", "dent", "scratch"))
    nominal = np.linspace(good.min(), scratch.max(), 19)
    result = measure.evaluate(CalibratedModel(nominal, false_alarm_rate=0.3), category)
    found = result.calibrated
    threshold = np.sort(nominal)[-6]  # floor(0.3 * 20)
    assert found.thresholds == (threshold,)
    assert found.map_thresholds == (threshold / 2,)
    assert found.false_alarms == Share(int(np.sum(good > threshold)), 9)
    assert found.missed_by_type == {
        "dent": Share(int(np.sum(dent <= threshold)), 3),
        "scratch": Share(int(np.sum(scratch <= threshold)), 4),
    }
    assert found.missed == Share(sum(s.count for s in found.missed_by_type.values()), 7)
    assert 0 < found.missed.count < 7
    # The largest value of a map is here three quarters of the score.
    assert found.marked == Share(int(np.sum(0.75 * good > threshold / 2)), 9)
    assert found.unmarked == Share(int(np.sum(0.75 * np.r_[dent, scratch] <= threshold / 2)), 7)
    assert sum(s.count for s in found.unmarked_by_type.values()) == found.unmarked.count
    expected = [(1 + np.sum(nominal >= score)) / 20 for score in good]
    np.testing.assert_allclose(found.p_values, expected, rtol=1e-15)
    assert (found.false_alarm_rate, found.confidence) == (0.3, None)
    assert (found.n_nominal, found.n_groups) == (19, 0)


def test_the_best_f1_is_as_without_a_calibration(category, plain):
    result = measure.evaluate(CalibratedModel(range(19), false_alarm_rate=0.3), category)
    assert plain.calibrated is None
    assert {image.decision for image in plain.images} == {None}
    assert (result.metrics, result.threshold) == (plain.metrics, plain.threshold)
    assert (result.n_false_alarms, result.n_missed) == (plain.n_false_alarms, plain.n_missed)


def test_a_score_at_the_threshold_is_no_alarm(category, plain):
    for kind, name in (("good", "false_alarms"), ("dent", "missed")):
        score = float(scores_of(plain, kind).max())
        below = np.nextafter(score, -np.inf)
        at, just_above = (
            measure.evaluate(CalibratedModel([t] * 9, false_alarm_rate=0.1), category).calibrated
            for t in (score, below)
        )
        n_at = int(np.sum(scores_of(plain, kind) == score))
        alarms = getattr(just_above, name).count - getattr(at, name).count
        assert alarms == (n_at if kind == "good" else -n_at)


def test_a_map_at_its_threshold_has_no_pixel_marked():
    decisions = [Decision(0.5, 2.0, False, value, 1.0) for value in (1.0, np.nextafter(1, 2))]
    nominal = NominalScores(np.arange(9.0), np.arange(9.0), None, {})
    found = judge(["good", "good"], [1.0, 1.0], decisions, nominal, 0.1, None)
    assert found.marked == Share(1, 2)


def test_each_group_has_its_own_threshold(tmp_path):
    names = [f"{i}{group}" for i in range(3) for group in "ab"]
    tests = [(kind, name, 20, 1) for kind in ("good", "dent") for name in names]
    category = find_categories(write_category(tmp_path / "plate", tests))[0]
    # Everything is an alarm in a, nothing is in b.
    model = CalibratedModel([0.0] * 9 + [1e6] * 9, "a" * 9 + "b" * 9, false_alarm_rate=0.1)
    found = measure.evaluate(model, category).calibrated
    assert found.thresholds == (0.0, 1e6)
    assert found.map_thresholds == (0.0, 5e5)
    assert (found.n_nominal, found.n_groups) == (18, 2)
    assert found.false_alarms == found.marked == Share(3, 6)
    assert found.missed == found.unmarked == Share(3, 6)
    assert sorted(found.p_values) == [0.1] * 3 + [1.0] * 3
    assert found.flatness is None


@pytest.mark.parametrize("kind", ["good", "dent"])
@pytest.mark.parametrize("n", [1, 3])
def test_images_of_one_class(category, kind, n):
    chosen = [sample for sample in category.test if sample.defect_type == kind][:n]
    only = dataclasses.replace(category, test=chosen)
    result = measure.evaluate(CalibratedModel([0.0] * 9, false_alarm_rate=0.1), only)
    found = result.calibrated
    good, bad = (n, 0) if kind == "good" else (0, n)
    assert (found.false_alarms, found.missed) == (Share(good, good), Share(0, bad))
    assert found.missed_by_type == ({} if kind == "good" else {"dent": Share(0, n)})
    assert (found.flatness is None) == (kind == "dent")
    plain = json.loads(json.dumps(result.to_json(), allow_nan=False))["calibrated"]
    other = plain["missed" if kind == "good" else "false_alarms"]
    assert other == {"count": 0, "of": 0, "rate": None, "interval": [None, None]}
    row, _ = results.summarize([result])
    assert math.isnan(row["calibrated_found"]) == (kind == "good")
    assert math.isnan(row["calibrated_false_alarms"]) == (kind == "dent")


def test_without_images_that_were_skipped(tmp_path):
    names = ("good", "000"), ("good", "bad"), ("dent", "000"), ("dent", "001")
    root = write_category(tmp_path / "plate", [(*name, 40, 1) for name in names])
    category = find_categories(root)[0]
    model = CalibratedModel([0.0] * 9, false_alarm_rate=0.1)
    found = measure.evaluate(model, category, skip_bad=True).calibrated
    assert (found.false_alarms, found.missed) == (Share(1, 1), Share(0, 2))


# --- p-values ---


def flatness(nominal, scores):
    nominal, scores = np.asarray(nominal, float), np.asarray(scores, float)
    p_values = (1 + (nominal[None] >= scores[:, None]).sum(1)) / (len(nominal) + 1)
    decisions = [Decision(p, 0.0, False, 0.0, 0.0) for p in p_values.tolist()]
    of = NominalScores(nominal, nominal, None, {})
    return judge(["good"] * len(scores), scores.tolist(), decisions, of, 0.1, None).flatness


@pytest.mark.parametrize("n", [1, 8, 9, 28, 29, 99, 308])
def test_each_p_value_is_in_its_bin(n):
    """Scores that take every possible p-value once, against bins in whole numbers."""
    found = flatness(np.arange(1, n + 1), np.arange(n + 1) + 0.5)
    possible = range(10, 10 * (n + 2), 10)  # times 10 (n + 1)
    bins = [range(b * (n + 1) + 1, (b + 1) * (n + 1) + 1) for b in range(BINS)]
    assert found.counts.tolist() == [sum(p in own for p in possible) for own in bins]
    np.testing.assert_allclose(found.expected, found.counts, rtol=1e-12)
    assert ((found.low <= found.expected) & (found.expected <= found.high)).all()


@pytest.mark.parametrize(("n", "n_test"), [(99, 60), (19, 200), (13, 5)])
def test_the_band_holds_each_bar_as_often_as_it_says(n, n_test):
    """Nominal images of one law, drawn anew with the calibration: a binomial band would hold fewer."""
    rng = np.random.default_rng(5)
    inside, flat = [], []
    for _ in range(300):
        found = flatness(rng.normal(size=n), rng.normal(size=n_test))
        inside.append((found.low <= found.counts) & (found.counts <= found.high))
        flat.append(found.p_value >= 0.05)
        assert found.counts.sum() == n_test
        assert found.expected.sum() == pytest.approx(n_test)
    assert np.mean(inside) > 0.94
    assert np.mean(flat) > 0.95 - 3 * math.sqrt(0.05 * 0.95 / 300)


def test_the_test_is_that_of_kolmogorov_and_smirnov_by_hand():
    # All 2 above all 3: of the 10 orders two are as extreme, this one and its mirror image.
    found = flatness([1, 2, 3], [4, 5])
    assert (found.distance, found.p_value) == (1, pytest.approx(0.2))
    assert found.verdict == "too few"


@pytest.mark.parametrize(
    ("n_test", "shift", "verdict"),
    [(100, 0, "flat"), (100, 0.7, "not flat"), (100, -0.7, "not flat"), (8, 0.7, "too few")],
)
def test_verdict(n_test, shift, verdict):
    rng = np.random.default_rng(1)
    found = flatness(rng.normal(size=99), rng.normal(shift, size=n_test))
    assert found.verdict == verdict
    # From the distance that is noticed on, the exact test says so as well, nearly.
    assert (found.distance > found.noticed) == (found.p_value < 0.05)


def test_many_images_take_the_asymptotic_law_quietly():
    rng = np.random.default_rng(2)
    found = flatness(rng.normal(size=10_007), rng.normal(size=10_009))
    assert found.verdict == "flat"


# --- JSON and the summary ---


def test_json_holds_decisions_and_intervals(category, plain):
    result = measure.evaluate(CalibratedModel(range(99), confidence=0.5), category)
    everything = json.loads(json.dumps(results.to_json([result, plain]), allow_nan=False))
    first, second = everything["categories"]
    assert second["calibrated"] is None
    assert second["images"][0].keys() == {"path", "defect_type", "score"}
    found = first["calibrated"]
    assert (found["false_alarm_rate"], found["confidence"], found["n_nominal"]) == (0.01, 0.5, 99)
    alarms = result.calibrated.false_alarms
    assert found["false_alarms"]["interval"] == list(alarms.interval)
    assert found["missed_by_type"]["dent"]["of"] == 3
    assert found["flatness"]["verdict"] == "too few"
    assert sum(found["flatness"]["counts"]) == len(found["p_values"]) == 9
    for image, plain_image in zip(result.images, first["images"], strict=True):
        assert plain_image["anomalous"] == (image.score > 98)
        assert plain_image["threshold"] == 98
        assert plain_image["map_maximum"] == 0.75 * image.score
    row, other, mean = everything["summary"]
    assert row["calibrated_found"] == mean["calibrated_found"] == 1 - result.calibrated.missed.rate
    assert row["calibrated_false_alarms"] == alarms.rate
    assert other["calibrated_found"] is None
