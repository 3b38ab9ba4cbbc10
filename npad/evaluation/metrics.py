"""AUROC, AP, F1-max and AUPRO of anomaly scores; higher score = more anomalous.

Definitions are scikit-learn's, with one difference: a metric that is undefined because only one
class is present is NaN, without a warning. Pixel metrics are exact, ties included, on tens of
millions of pixels: between two neighbouring scores of anomalous pixels only the *number* of
nominal pixels matters, so the nominal scores are sorted once and counted, and everything after
that is as long as the anomalous pixels are many.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage
from sklearn import metrics as sk

__all__ = [
    "IMAGE_METRICS",
    "PIXEL_METRICS",
    "Curve",
    "PixelRanking",
    "aupro",
    "best_f1",
    "cut",
    "image_metrics",
    "pixel_metrics",
    "pro_curve",
    "rank_pixels",
    "roc_curve",
]

IMAGE_METRICS = ("auroc", "ap", "f1_max")
PIXEL_METRICS = ("pixel_auroc", "pixel_ap", "pixel_f1_max", "aupro")

Curve: TypeAlias = tuple[NDArray[np.float64], NDArray[np.float64]]  # x and y, both ascending

# Pixels that touch at a corner are one region, as in MVTec's own evaluation of AUPRO.
_EIGHT_NEIGHBOURS = np.ones((3, 3), dtype=bool)


def image_metrics(labels: ArrayLike, scores: ArrayLike) -> dict[str, float]:
    """Metrics of one score per image.

    Parameters
    ----------
    labels : (N,) bool or 0/1, true where the image is defective
    scores : (N,) float, finite

    Returns
    -------
    dict with ``auroc``, ``ap`` (average precision) and ``f1_max`` (the best F1 over all
    thresholds); NaN where only one class is present.

    Raises
    ------
    ValueError
        Shapes differ, a label is neither 0 nor 1, or a score is not finite.
    """
    auroc, ap, f1_max, _ = _summarize(*_checked(labels, scores))
    return {"auroc": auroc, "ap": ap, "f1_max": f1_max}


def best_f1(labels: ArrayLike, scores: ArrayLike) -> tuple[float, float]:
    """Return the best F1 and the threshold that reaches it (``score >= threshold`` is an alarm).

    Of several equally good thresholds the highest is returned: the one with the fewest alarms.
    Both are NaN where only one class is present. Parameters and errors as `image_metrics`.
    """
    _, _, f1_max, threshold = _summarize(*_checked(labels, scores))
    return f1_max, threshold


def roc_curve(labels: ArrayLike, scores: ArrayLike) -> Curve:
    """Return false and true positive rates, both ascending from 0 to 1.

    Both are empty where only one class is present. Parameters and errors as `image_metrics`.
    """
    y, s = _checked(labels, scores)
    if y.all() or not y.any():
        return np.empty(0), np.empty(0)
    fpr, tpr, _ = sk.roc_curve(y, s)
    return fpr, tpr


@dataclass(frozen=True)
class PixelRanking:
    """All pixels of a test set, ranked by score and reduced to what the metrics need.

    U is the number of distinct scores of anomalous pixels; they are ordered from high to low.

    Attributes
    ----------
    anomalous : (U,) int64, anomalous pixels with that score
    overlap : (U,) float64, what they add to the mean overlap over regions; sums to 1
    nominal_above : (U,) int64, nominal pixels with a higher score
    nominal_at : (U,) int64, nominal pixels with that score or a higher one
    n_nominal, n_regions : int, nominal pixels and connected anomalous regions
    """

    anomalous: NDArray[np.int64]
    overlap: NDArray[np.float64]
    nominal_above: NDArray[np.int64]
    nominal_at: NDArray[np.int64]
    n_nominal: int
    n_regions: int

    def roc_curve(self) -> Curve:
        """Return false and true positive rates of pixels, ascending; empty where undefined."""
        return self._curve(self.anomalous / max(self.anomalous.sum(), 1))

    def pro_curve(self) -> Curve:
        """Return the false positive rate of pixels and the mean overlap over regions, ascending.

        Both are empty where there is no region or no nominal pixel.
        """
        return self._curve(self.overlap)

    def aupro(self, limit: float = 0.3) -> float:
        """Return the area under `pro_curve` up to a false positive rate, divided by that rate.

        Raises
        ------
        ValueError
            The limit is not in (0, 1].
        """
        if not 0 < limit <= 1:
            raise ValueError(f"aupro: limit must be above 0 and at most 1, got {limit}")
        fpr, pro = cut(self.pro_curve(), limit)
        return float(sk.auc(fpr, pro) / limit) if len(fpr) else float("nan")

    def metrics(self, limit: float = 0.3) -> dict[str, float]:
        """Return ``pixel_auroc``, ``pixel_ap``, ``pixel_f1_max`` and ``aupro``."""
        if not self.n_nominal or not self.n_regions:
            return dict.fromkeys(PIXEL_METRICS, float("nan"))
        found = np.cumsum(self.anomalous)
        alarms = found + self.nominal_at
        return {
            "pixel_auroc": float(sk.auc(*self.roc_curve())),
            "pixel_ap": float(np.sum(self.anomalous / found[-1] * (found / alarms))),
            "pixel_f1_max": float(np.max(2 * found / (alarms + found[-1]))),
            "aupro": self.aupro(limit),
        }

    def _curve(self, rise: NDArray[np.float64]) -> Curve:
        # Down the scores: nominal pixels between two anomalous scores move right, then one score
        # moves right (its nominal pixels) and up (its anomalous ones) at once.
        if not self.n_nominal or not self.n_regions:
            return np.empty(0), np.empty(0)
        right = np.column_stack([self.nominal_above, self.nominal_at]).ravel() / self.n_nominal
        total = np.minimum(np.cumsum(rise), 1.0)
        total[-1] = 1.0
        up = np.column_stack([np.concatenate([[0.0], total[:-1]]), total]).ravel()
        return np.concatenate([[0.0], right, [1.0]]), np.concatenate([[0.0], up, [1.0]])


def cut(curve: Curve, limit: float) -> Curve:
    """Return the part of a curve up to x = limit, interpolated linearly; an empty one stays empty."""
    x, y = curve
    if not len(x):
        return curve
    inside = int(np.searchsorted(x, limit, side="right"))
    end = np.interp(limit, x[inside - 1 : inside + 1], y[inside - 1 : inside + 1])
    return np.append(x[:inside], limit), np.append(y[:inside], end)


def rank_pixels(masks: Iterable[ArrayLike], maps: Sequence[ArrayLike]) -> PixelRanking:
    """Rank all pixels of a set of anomaly maps; one sort serves every pixel metric and curve.

    Parameters
    ----------
    masks : N arrays (H, W) bool or 0/1, true where the pixel is anomalous; a mask that is empty
        makes all pixels of its image nominal
    maps : N arrays (H, W) float, NaN where a pixel is not measured, as outside of a region of interest,
        and finite elsewhere; sizes may differ between images

    Raises
    ------
    ValueError
        Number or shape of masks and maps differ, or a map is infinite somewhere.

    Notes
    -----
    Memory: one copy of the nominal scores (float32, or float64 where a map is), and about
    100 bytes for each anomalous pixel.
    """
    inside = [np.asarray(mask, dtype=bool) for mask in masks]
    scored = [np.asarray(one_map) for one_map in maps]
    if len(inside) != len(scored):
        raise ValueError(f"pixel metrics: {len(inside)} masks for {len(scored)} maps")
    for i, (mask, one_map) in enumerate(zip(inside, scored, strict=True)):
        if one_map.ndim != 2 or mask.shape != one_map.shape:
            raise ValueError(
                f"pixel metrics: map {i} has shape {one_map.shape} and its mask {mask.shape};"
                " both must be (H, W)"
            )
        if np.isinf(one_map).any():
            raise ValueError(f"pixel metrics: map {i} has values that are infinite")

    measured = [~np.isnan(one_map) for one_map in scored]
    dtype = np.result_type(np.float32, *(one_map.dtype for one_map in scored))
    n_nominal = sum(np.count_nonzero(of & ~mask) for mask, of in zip(inside, measured, strict=True))
    nominal = np.empty(n_nominal, dtype)
    scores, weights, filled, n_regions = [np.empty(0, dtype)], [np.empty(0)], 0, 0
    for whole, of, one_map in zip(inside, measured, scored, strict=True):
        mask = whole & of
        outside = one_map[of & ~whole]
        nominal[filled : filled + len(outside)] = outside
        filled += len(outside)
        if mask.any():
            regions, found = ndimage.label(mask, structure=_EIGHT_NEIGHBOURS)
            region_of_pixel = regions[mask]
            n_regions += found
            scores.append(one_map[mask].astype(dtype))
            weights.append(1.0 / np.bincount(region_of_pixel)[region_of_pixel])
    nominal.sort()
    values, level, anomalous = np.unique(
        np.concatenate(scores), return_inverse=True, return_counts=True
    )
    overlap = np.bincount(level, np.concatenate(weights), minlength=len(values))
    above = len(nominal) - np.searchsorted(nominal, values, side="right")
    at = len(nominal) - np.searchsorted(nominal, values, side="left")
    return PixelRanking(
        anomalous=anomalous[::-1].astype(np.int64),
        overlap=overlap[::-1] / max(n_regions, 1),
        nominal_above=above[::-1].astype(np.int64),
        nominal_at=at[::-1].astype(np.int64),
        n_nominal=len(nominal),
        n_regions=n_regions,
    )


def pixel_metrics(
    masks: Iterable[ArrayLike], maps: Sequence[ArrayLike], limit: float = 0.3
) -> dict[str, float]:
    """Metrics of one score per pixel, over the pixels of all images together.

    Parameters
    ----------
    masks, maps : as `rank_pixels`
    limit : false positive rate up to which AUPRO is integrated

    Returns
    -------
    dict with ``pixel_auroc``, ``pixel_ap``, ``pixel_f1_max`` and ``aupro``; NaN where there is no
    anomalous or no nominal pixel.

    Raises
    ------
    ValueError
        As `rank_pixels`; or the limit is not in (0, 1].
    """
    return rank_pixels(masks, maps).metrics(limit)


def pro_curve(masks: Iterable[ArrayLike], maps: Sequence[ArrayLike]) -> Curve:
    """Return the per-region overlap curve: false positive rates and mean overlaps, ascending.

    Notes
    -----
    At a threshold, the overlap of a region is the share of its pixels that score at least the
    threshold; PRO is the mean over all regions of all images, so that a small defect counts as
    much as a large one. Regions are connected components, corners included (8-connectivity). The
    false positive rate is over all nominal pixels of all images. The curve is exact: every
    distinct score is a threshold (those on a straight piece are left out), and scores that tie
    make one sloping piece.
    Source: Bergmann et al., *The MVTec Anomaly Detection Dataset*, IJCV 2021.
    """
    return rank_pixels(masks, maps).pro_curve()


def aupro(masks: Iterable[ArrayLike], maps: Sequence[ArrayLike], limit: float = 0.3) -> float:
    """Return the normalised area under `pro_curve` up to false positive rate ``limit``.

    The curve is cut at the limit by linear interpolation and the area divided by the limit, so 1
    is perfect. NaN where there is no region or no nominal pixel. Parameters and errors as
    `pixel_metrics`.
    """
    return rank_pixels(masks, maps).aupro(limit)


def _checked(labels: ArrayLike, scores: ArrayLike) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    y, s = np.asarray(labels), np.asarray(scores, dtype=np.float64)
    if y.ndim != 1 or y.shape != s.shape:
        raise ValueError(
            f"metrics: labels and scores must have one shape (N,), got {y.shape} and {s.shape}"
        )
    if not np.isin(y, (0, 1)).all():
        raise ValueError("metrics: labels must be 0 (nominal) or 1 (anomalous)")
    if not np.isfinite(s).all():
        raise ValueError(f"metrics: score {int(np.argmin(np.isfinite(s)))} is not finite")
    return y.astype(bool), s


def _summarize(
    y: NDArray[np.bool_], scores: NDArray[np.float64]
) -> tuple[float, float, float, float]:
    """AUROC, average precision, best F1 and its threshold; all NaN where one class is missing."""
    if y.all() or not y.any():
        return (float("nan"),) * 4
    precision, recall, thresholds = sk.precision_recall_curve(y, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, np.finfo(np.float64).tiny)
    best = len(thresholds) - 1 - int(np.argmax(f1[-2::-1]))  # the last point has no threshold
    return (
        float(sk.roc_auc_score(y, scores)),
        float(sk.average_precision_score(y, scores)),
        float(f1[best]),
        float(thresholds[best]),
    )
