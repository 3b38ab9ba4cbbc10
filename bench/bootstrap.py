"""Intervals for metrics, over the test images that there might have been.

Good and defective images are drawn anew, each kind by itself, as often as there are. Two configurations
are compared on the same draws. Pixels are counted in bins of equal numbers of pixels, so that a draw is
a product of matrices; what that costs is in the fourth digit, and the tests hold it to .001.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

DRAWS = 1000
BINS = 2000
LIMIT = 0.3  # of the false positive rate, for AUPRO

Array = NDArray[np.float64]


def draws(labels: NDArray[np.bool_], seed: int = 0) -> Array:
    """How often each image is drawn: (DRAWS, N). The first row is the images as they are."""
    rng = np.random.default_rng(seed)
    counts = np.ones((DRAWS + 1, len(labels)))
    for kind in (labels, ~labels):
        n = int(kind.sum())
        counts[1:, kind] = rng.multinomial(n, np.full(n, 1 / max(n, 1)), size=DRAWS)
    return counts


def auroc(labels: NDArray[np.bool_], scores: Array, counts: Array) -> Array:
    """Image AUROC of every draw."""
    good, bad = scores[~labels], scores[labels]
    wins = (bad[:, None] > good).astype(float) + 0.5 * (bad[:, None] == good)
    pairs = np.einsum("dg,gb,db->d", counts[:, ~labels], wins.T, counts[:, labels], optimize=True)
    totals: Array = counts[:, ~labels].sum(1) * counts[:, labels].sum(1)
    return np.asarray(pairs / totals)


def pixel_metrics(
    masks: Sequence[NDArray[np.bool_]], maps: NDArray[np.float32], counts: Array
) -> dict[str, Array]:
    """Pixel AUROC and AUPRO of every draw."""
    edges = np.unique(np.quantile(maps[:, ::4, ::4], np.linspace(0, 1, BINS + 1)[1:-1]))
    n, bins = len(maps), len(edges) + 1
    nominal, anomalous, overlap = (np.zeros((n, bins)) for _ in range(3))
    regions = np.zeros(n)
    for i, (mask, one_map) in enumerate(zip(masks, maps, strict=True)):
        where = bins - 1 - np.searchsorted(edges, one_map, side="right")  # the highest come first
        nominal[i] = np.bincount(where[~mask], minlength=bins)
        if mask.any():
            anomalous[i] = np.bincount(where[mask], minlength=bins)
            region, found = ndimage.label(mask, structure=np.ones((3, 3)))
            share = 1 / np.bincount(region[mask])[region[mask]]
            overlap[i] = np.bincount(where[mask], share, minlength=bins)
            regions[i] = found
    right = _curve(counts @ nominal)
    return {
        "pixel_auroc": _area(right, _curve(counts @ anomalous)),
        "aupro": _area(right, _curve(counts @ overlap, counts @ regions), LIMIT),
    }


def _curve(steps: Array, total: Array | None = None) -> Array:
    """Cumulative shares, from 0: (draws, bins + 1)."""
    sums = np.cumsum(steps, axis=1)
    whole = sums[:, -1] if total is None else total
    return np.pad(sums / whole[:, None], ((0, 0), (1, 0)))


def _area(x: Array, y: Array, limit: float = 1.0) -> Array:
    """Area under each curve up to x = limit, over the limit."""
    inside = np.minimum(x, limit)
    width = np.diff(inside, axis=1)
    slope = np.diff(y, axis=1) / np.maximum(np.diff(x, axis=1), 1e-300)
    height = y[:, :-1] + slope * width / 2
    return np.asarray((width * height).sum(1) / limit)


def interval(values: Array) -> tuple[float, float]:
    """Where 95 % of the draws lie."""
    low, high = np.quantile(values[1:], (0.025, 0.975))
    return float(low), float(high)


def with_interval(values: Array) -> list[float]:
    """The value and its interval, for a report."""
    return [round(float(x), 5) for x in (values[0], *interval(values))]
