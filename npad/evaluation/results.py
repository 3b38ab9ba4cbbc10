"""What an evaluation found: the results of a category, summary rows, JSON."""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npad import environment
from npad.evaluation.calibrated import Calibrated, Decision
from npad.evaluation.datasets import GOOD
from npad.evaluation.metrics import IMAGE_METRICS, PIXEL_METRICS, Curve

__all__ = [
    "CALIBRATED",
    "METRICS",
    "NO_MASKS",
    "PRO_LIMIT",
    "CategoryResult",
    "Picture",
    "ScoredImage",
    "summarize",
    "to_json",
    "versions",
]

PRO_LIMIT = 0.3  # false positive rate up to which AUPRO is integrated
METRICS = (*IMAGE_METRICS, *PIXEL_METRICS)
CALIBRATED = ("calibrated_false_alarms", "calibrated_found")  # shares, of calibrated models
NO_MASKS = "no masks"  # what a table says in the place of a figure that needs them


@dataclass(frozen=True)
class ScoredImage:
    """One test image and its score; if the model is calibrated, what it decided."""

    path: Path
    defect_type: str
    score: float
    decision: Decision | None = None

    @property
    def is_anomalous(self) -> bool:
        """Whether the image shows a defect."""
        return self.defect_type != GOOD


@dataclass(frozen=True, eq=False)
class Picture:
    """One test image picked for the report.

    Attributes
    ----------
    image : ScoredImage
    group : str
        Why it was picked: ``"good"`` (good images, highest score first), ``"defective"`` (lowest
        first) or ``"typical"`` (the median of its type).
    levels : (H, W) uint8
        Its anomaly map at the metric size; 0 to 255 is `CategoryResult.color_range`.
    mask : (H, W) bool
        None where the category has no masks.
    """

    image: ScoredImage
    group: str
    levels: NDArray[np.uint8]
    mask: NDArray[np.bool_] | None


@dataclass(frozen=True, eq=False)
class CategoryResult:
    """All that was measured on one category.

    Attributes
    ----------
    name, n_train : name of the category, number of images fitted
    images : test images in the order of the category, without those that were skipped
    has_masks : whether it is known where the defects are; without it, what is measured on pixels is
        NaN or empty
    metrics : `METRICS`, over all test images; NaN where undefined
    types : for each defect type `METRICS` of its images against the good ones, and the counts
        ``n_images``, ``n_regions`` (connected regions at the metric size) and ``n_missed``
    threshold : image score with the best F1 on the test images; it is chosen with their labels, so
        it serves to read the result and not to operate. NaN where undefined.
    n_false_alarms, n_missed : images on the wrong side of the threshold
    curves : (x, y) of ``"roc"``, ``"pixel_roc"`` and ``"pro"`` (up to `PRO_LIMIT`), thinned to
        some of their points; empty where undefined
    metric_size : (height, width) of maps and masks in the pixel metrics
    color_range : map values that are drawn as the ends of the colour scale: the median of the good
        images (of all, if there are none) and the 99.9th percentile of all pixels
    pictures : images for the report, at most 24
    fit_seconds : NaN if the model had been fitted before
    predict_seconds : decoding included, metrics not
    model_bytes : size of the fitted model, None if the model does not tell
    settings : arguments of the model
    fitted : what it chose or found while fitting, such as ``n_images_`` and ``members_``
    skipped : (path, reason) of training and test images that could not be read
    notes : what a reader of the figures should know
    calibrated : what the model's own thresholds gave; None where it is not calibrated
    """

    name: str
    n_train: int
    images: list[ScoredImage]
    has_masks: bool
    metrics: dict[str, float]
    types: dict[str, dict[str, float]]
    threshold: float
    n_false_alarms: int
    n_missed: int
    curves: dict[str, Curve]
    metric_size: tuple[int, int]
    color_range: tuple[float, float]
    pictures: list[Picture]
    fit_seconds: float
    predict_seconds: float
    model_bytes: int | None
    settings: dict[str, Any]
    fitted: dict[str, Any]
    skipped: list[tuple[str, str]]
    notes: list[str]
    calibrated: Calibrated | None = None

    @property
    def images_per_second(self) -> float:
        """Images scored in a second, decoding included."""
        return len(self.images) / self.predict_seconds if self.predict_seconds else math.nan

    def to_json(self) -> dict[str, Any]:
        """Return everything but the pictures as JSON values; NaN becomes None."""
        plain: dict[str, Any] = _plain(
            {
                "category": self.name,
                "n_train": self.n_train,
                "n_test": len(self.images),
                "has_masks": self.has_masks,
                "metrics": self.metrics,
                "types": self.types,
                "threshold": self.threshold,
                "n_false_alarms": self.n_false_alarms,
                "n_missed": self.n_missed,
                "calibrated": self.calibrated and self.calibrated.to_json(),
                "metric_size": self.metric_size,
                "pro_limit": PRO_LIMIT,
                "fit_seconds": self.fit_seconds,
                "predict_seconds": self.predict_seconds,
                "images_per_second": self.images_per_second,
                "model_bytes": self.model_bytes,
                "settings": self.settings,
                "fitted": self.fitted,
                "skipped": [{"path": path, "reason": reason} for path, reason in self.skipped],
                "notes": self.notes,
                "curves": {k: {"x": x, "y": y} for k, (x, y) in self.curves.items()},
                "images": [
                    {
                        "path": image.path,
                        "defect_type": image.defect_type,
                        "score": image.score,
                        **(vars(image.decision) if image.decision else {}),
                    }
                    for image in self.images
                ],
            }
        )
        return plain


def summarize(results: Sequence[CategoryResult]) -> list[dict[str, Any]]:
    """One row for each category and a last one, ``"mean"``, with the mean over categories.

    Keys: ``category``, ``has_masks`` (of the mean: of any), `METRICS`, `CALIBRATED` (shares of the good
    and of the defective images that are above the calibrated threshold), ``n_train``, ``n_test``,
    ``fit_seconds`` and ``images_per_second``. Undefined values are NaN and left out of the means.
    """
    rows: list[dict[str, Any]] = [
        {
            "category": result.name,
            "has_masks": result.has_masks,
            **result.metrics,
            **dict(zip(CALIBRATED, _above_threshold(result.calibrated), strict=True)),
            "n_train": result.n_train,
            "n_test": len(result.images),
            "fit_seconds": result.fit_seconds,
            "images_per_second": result.images_per_second,
        }
        for result in results
    ]
    mean = {"category": "mean", "has_masks": any(row["has_masks"] for row in rows)}
    for key in [key for key in rows[0] if key not in mean] if rows else []:
        known = [row[key] for row in rows if not math.isnan(row[key])]
        mean[key] = sum(known) / len(known) if known else math.nan
    return [*rows, mean] if rows else []


def _above_threshold(calibrated: Calibrated | None) -> tuple[float, float]:
    if calibrated is None:
        return math.nan, math.nan
    return calibrated.false_alarms.rate, 1 - calibrated.missed.rate


def to_json(results: Sequence[CategoryResult]) -> dict[str, Any]:
    """Return a whole evaluation as JSON values: versions, summary rows and every category."""
    return {
        "versions": versions(),
        "summary": _plain(summarize(results)),
        "categories": [result.to_json() for result in results],
    }


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that decide the figures."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        **environment.versions("npad", "torch", *environment.PACKAGES),
    }


def _plain(value: Any) -> Any:
    """Turn NumPy values, paths and NaN into what JSON has."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value
