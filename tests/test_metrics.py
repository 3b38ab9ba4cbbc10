"""Metrics against scikit-learn, explicit thresholds, an independent AUPRO and worked cases."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from sklearn import metrics as sk

from npad.evaluation import metrics

NAN = float("nan")


def scenes(seed: int, n: int = 5, size: tuple[int, int] = (17, 23), levels: int = 7):
    """Masks with several regions, some of which touch only at corners, and maps with many ties."""
    rng = np.random.default_rng(seed)
    blobs = ndimage.gaussian_filter(rng.standard_normal((n, *size)), (0, 1.5, 1.5))
    masks = blobs > np.quantile(blobs, 0.85)
    masks[0] = False
    maps = np.round(levels * (rng.random((n, *size)) + 0.6 * masks) / 1.6)
    return masks, maps.astype(np.float32)


def brute_force_pro(masks, maps):
    """The definition, one threshold and one region at a time."""
    nominal = maps[~masks]
    points = [(0.0, 0.0)]
    for threshold in sorted(set(maps.ravel().tolist()), reverse=True):
        overlaps = []
        for mask, one_map in zip(masks, maps, strict=True):
            regions, n_regions = ndimage.label(mask, structure=np.ones((3, 3)))
            overlaps += [
                np.mean(one_map[regions == k] >= threshold) for k in range(1, n_regions + 1)
            ]
        points.append((np.mean(nominal >= threshold), np.mean(overlaps)))
    return np.array(points).T


def area_until(x, y, limit):
    """Trapezoids, the last one cut at the limit."""
    area = 0.0
    for x0, x1, y0, y1 in zip(x[:-1], x[1:], y[:-1], y[1:], strict=True):
        if x1 <= limit:
            area += (x1 - x0) * (y0 + y1) / 2
        elif x0 < limit:
            area += (limit - x0) * (2 * y0 + (y1 - y0) * (limit - x0) / (x1 - x0)) / 2
    return area


def pairwise_aupro(masks, maps, limit):
    """AUPRO with no curve at all: each region's mean win rate against the top nominal pixels.

    A nominal pixel that only partly fits under the limit counts with that part; nominal pixels of
    the score at the limit share a sloping piece of the curve, whose area is worked out in closed
    form.
    """
    nominal = np.sort(maps[~masks].astype(np.float64))[::-1]
    budget = limit * len(nominal)
    at_limit = nominal[min(int(np.ceil(budget)) - 1, len(nominal) - 1)]
    higher, tied = nominal[nominal > at_limit], np.sum(nominal == at_limit)
    part = budget - len(higher)  # of the tied ones
    areas = []
    for mask, one_map in zip(masks, maps, strict=True):
        regions, n_regions = ndimage.label(mask, structure=np.ones((3, 3)))
        for k in range(1, n_regions + 1):
            inside = one_map[regions == k].astype(np.float64)
            wins = np.mean(inside[:, None] > higher, axis=0) if len(higher) else np.zeros(0)
            ties = np.mean(inside[:, None] == higher, axis=0) if len(higher) else np.zeros(0)
            edge = np.mean(inside > at_limit) * part
            edge += np.mean(inside == at_limit) * part**2 / (2 * tied)
            areas.append((np.sum(wins + ties / 2) + edge) / budget)
    return np.mean(areas)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("levels", [2, 7, 10_000])
@pytest.mark.parametrize("limit", [0.02, 0.3, 1.0])
def test_aupro_is_the_brute_force_area(seed, levels, limit):
    masks, maps = scenes(seed, levels=levels)
    fpr, pro = brute_force_pro(masks, maps)
    assert metrics.aupro(masks, maps, limit) == pytest.approx(
        area_until(fpr, pro, limit) / limit, abs=1e-12
    )
    assert metrics.aupro(masks, maps, limit) == pytest.approx(
        pairwise_aupro(masks, maps, limit), abs=1e-12
    )


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1), st.integers(1, 5), st.floats(0.01, 1.0), st.sampled_from([0.1, 0.5])
)
def test_aupro_with_any_ties_and_limit(seed, levels, limit, share):
    rng = np.random.default_rng(seed)
    masks = rng.random((2, 6, 5)) < share
    masks[0, 0, 0], masks[1, 0, 0] = True, False
    maps = rng.integers(0, levels, masks.shape).astype(np.float64)
    assert metrics.aupro(masks, maps, limit) == pytest.approx(
        pairwise_aupro(masks, maps, limit), abs=1e-12
    )


def test_pro_curve_passes_through_every_threshold():
    masks, maps = scenes(3, levels=5)
    fpr, pro = metrics.pro_curve(masks, maps)
    for x, y in brute_force_pro(masks, maps).T:
        here = slice(np.searchsorted(fpr, x - 1e-12), np.searchsorted(fpr, x + 1e-12, side="right"))
        low, high = pro[here].min(initial=1), pro[here].max(initial=0)
        if low > high:  # between two vertices, on a straight piece
            low = high = np.interp(x, fpr, pro)
        assert low - 1e-12 <= y <= high + 1e-12
    assert (np.diff(fpr) >= 0).all()
    assert (np.diff(pro) >= 0).all()
    assert (fpr[0], pro[0], fpr[-1], pro[-1]) == (0, 0, 1, 1)


def test_aupro_by_hand():
    # Regions of 1 and 3 pixels, 4 nominal pixels. From the top: the small region (overlap 1/2),
    # one nominal pixel (FPR 1/4), the large region (overlap 1), the other nominal pixels.
    mask = np.array([[1, 0, 1, 1], [0, 0, 0, 1]], dtype=bool)
    scores = np.array([[9.0, 8.0, 7.0, 7.0], [1.0, 1.0, 1.0, 7.0]])
    assert metrics.aupro([mask], [scores], limit=0.25) == pytest.approx(0.5)
    assert metrics.aupro([mask], [scores], limit=0.5) == pytest.approx(0.75)
    # All tied: the curve is the diagonal.
    assert metrics.aupro([mask], [np.ones((2, 4))], limit=0.3) == pytest.approx(0.15)


def test_corner_neighbours_are_one_region():
    mask = np.eye(4, dtype=bool)
    assert metrics.rank_pixels([mask], [np.zeros((4, 4))]).n_regions == 1


def test_small_regions_weigh_as_much_as_large_ones():
    mask = np.zeros((20, 20), dtype=bool)
    mask[:10, :10] = True
    mask[15, 15] = True
    scores = np.where(mask, 1.0, 0.0)
    scores[15, 15] = -1.0  # the one small region is missed altogether
    assert metrics.aupro([mask], [scores], limit=0.3) == pytest.approx(0.5)


def test_aupro_agrees_with_anomalib():
    torch = pytest.importorskip("torch")
    aupro = pytest.importorskip("anomalib.metrics.aupro")
    rng = np.random.default_rng(8)
    masks, _ = scenes(8, n=6, size=(40, 48))
    maps = (rng.random(masks.shape) + 0.4 * masks).astype(np.float32)
    theirs = aupro._AUPRO(fpr_limit=0.3)
    theirs.update(torch.from_numpy(maps), torch.from_numpy(masks.astype(np.int64)))
    assert metrics.aupro(masks, maps) == pytest.approx(float(theirs.compute()), abs=2e-4)


@pytest.mark.parametrize("levels", [2, 7, 10_000])
@pytest.mark.parametrize("seed", range(3))
def test_pixel_metrics_are_scikit_learns(seed, levels):
    masks, maps = scenes(seed, levels=levels)
    y, s = masks.ravel(), maps.ravel()
    ours = metrics.pixel_metrics(masks, maps)
    precision, recall, _ = sk.precision_recall_curve(y, s)
    assert ours["pixel_auroc"] == pytest.approx(sk.roc_auc_score(y, s), abs=1e-12)
    assert ours["pixel_ap"] == pytest.approx(sk.average_precision_score(y, s), abs=1e-12)
    best = max(2 * p * r / (p + r) for p, r in zip(precision, recall, strict=True) if p + r > 0)
    assert ours["pixel_f1_max"] == pytest.approx(best, abs=1e-12)
    assert ours["aupro"] == metrics.aupro(masks, maps)
    fpr, tpr = metrics.rank_pixels(masks, maps).roc_curve()
    assert sk.auc(fpr, tpr) == pytest.approx(ours["pixel_auroc"], abs=1e-12)


def test_pixel_metrics_do_not_depend_on_the_order_of_images_or_a_monotone_scale():
    masks, maps = scenes(5)
    expected = metrics.pixel_metrics(masks, maps)
    assert metrics.pixel_metrics(masks[::-1], maps[::-1]) == pytest.approx(expected, abs=1e-12)
    assert metrics.pixel_metrics(masks, np.exp(maps / 4)) == pytest.approx(expected, abs=1e-12)


def test_images_of_different_sizes():
    masks, maps = scenes(6, n=2)
    cut = metrics.pixel_metrics([masks[0], masks[1][:9]], [maps[0], maps[1][:9]])
    y = np.concatenate([masks[0].ravel(), masks[1][:9].ravel()])
    s = np.concatenate([maps[0].ravel(), maps[1][:9].ravel()])
    assert cut["pixel_auroc"] == pytest.approx(sk.roc_auc_score(y, s), abs=1e-12)


def test_image_metrics_are_scikit_learns_and_the_threshold_reaches_the_best_f1():
    rng = np.random.default_rng(2)
    labels = rng.random(200) < 0.3
    scores = np.round(rng.random(200) + 0.5 * labels, 1)
    ours = metrics.image_metrics(labels, scores)
    assert ours["auroc"] == sk.roc_auc_score(labels, scores)
    assert ours["ap"] == sk.average_precision_score(labels, scores)
    f1 = {t: sk.f1_score(labels, scores >= t) for t in np.unique(scores)}
    assert ours["f1_max"] == pytest.approx(max(f1.values()), abs=1e-12)
    best, threshold = metrics.best_f1(labels, scores)
    assert best == ours["f1_max"]
    assert f1[threshold] == pytest.approx(best, abs=1e-12)


def test_of_equal_thresholds_the_one_with_fewest_alarms_is_chosen():
    # F1 is 2/3 at both 3 (one hit, one defect missed) and 1 (two hits, two false alarms).
    assert metrics.best_f1([1, 0, 0, 1], [3, 2, 1, 1]) == (pytest.approx(2 / 3), 3.0)


def test_roc_curve_area():
    rng = np.random.default_rng(4)
    labels, scores = rng.random(50) < 0.5, rng.integers(0, 9, 50)
    assert sk.auc(*metrics.roc_curve(labels, scores)) == pytest.approx(
        sk.roc_auc_score(labels, scores)
    )


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_is_nan_and_silent(label):
    labels = np.full(4, label)
    expected = {"auroc": NAN, "ap": NAN, "f1_max": NAN}
    assert metrics.image_metrics(labels, np.arange(4.0)) == pytest.approx(expected, nan_ok=True)
    assert metrics.best_f1(labels, np.arange(4.0)) == pytest.approx((NAN, NAN), nan_ok=True)
    assert len(metrics.roc_curve(labels, np.arange(4.0))[0]) == 0
    masks, maps = np.full((2, 3, 3), bool(label)), np.arange(18.0).reshape(2, 3, 3)
    expected = dict.fromkeys(("pixel_auroc", "pixel_ap", "pixel_f1_max", "aupro"), NAN)
    assert metrics.pixel_metrics(masks, maps) == pytest.approx(expected, nan_ok=True)
    assert len(metrics.pro_curve(masks, maps)[0]) == 0


def test_nothing_at_all_is_nan():
    assert np.isnan(list(metrics.image_metrics([], []).values())).all()
    assert np.isnan(list(metrics.pixel_metrics([], []).values())).all()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_perfect_maps_of_any_dtype(dtype):
    masks, _ = scenes(1)
    expected = {"pixel_auroc": 1, "pixel_ap": 1, "pixel_f1_max": 1, "aupro": 1}
    assert metrics.pixel_metrics(masks, masks.astype(dtype)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.image_metrics([0, 1], [0.0]), r"one shape \(N,\), got \(2,\) and \(1,\)"),
        (lambda: metrics.image_metrics([0, 2], [0.0, 1.0]), "labels must be 0"),
        (lambda: metrics.image_metrics([0, 1], [0.0, NAN]), "score 1 is not finite"),
        (lambda: metrics.aupro(np.ones((2, 3, 3)), np.ones((1, 3, 3))), "2 masks for 1 maps"),
        (
            lambda: metrics.aupro(np.ones((1, 3, 4)), np.ones((1, 3, 3))),
            r"map 0 has shape \(3, 3\)",
        ),
        (lambda: metrics.aupro(np.ones((1, 2, 2)), np.full((1, 2, 2), np.inf)), "map 0 has values"),
        (
            lambda: metrics.aupro(np.eye(2)[None], np.eye(2)[None], limit=0.0),
            "limit must be above 0",
        ),
        (
            lambda: metrics.aupro(np.eye(2)[None], np.eye(2)[None], limit=1.5),
            "limit must be above 0",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_six_hundred_maps_take_seconds():
    rng = np.random.default_rng(0)
    maps = rng.random((600, 256, 256), dtype=np.float32)
    masks = np.zeros(maps.shape, dtype=bool)
    masks[:300, 40:90, 60:110] = True
    maps[masks] += 0.5
    start = time.perf_counter()
    result = metrics.pixel_metrics(masks, maps)
    seconds = time.perf_counter() - start
    assert result["pixel_auroc"] == pytest.approx(0.875, abs=1e-3)  # P(u + 1/2 > v), u, v uniform
    assert result["aupro"] == pytest.approx(0.65, abs=2e-3)  # mean of 1/2 + f over f in [0, 0.3]
    assert seconds < 30, f"{seconds:.1f} s"  # about 3 s on a quiet machine
