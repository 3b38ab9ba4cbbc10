"""Fit a model on a category, score its test images, and measure the result.

Pixel metrics are computed at one size for all images, by default the model's input size: memory
stays bounded whatever the size of the images, images of different sizes weigh the same, and the
figures compare with published ones, which are computed in the same way.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from npad.evaluation import metrics
from npad.evaluation.datasets import GOOD, Category, Sample, read_mask
from npad.evaluation.results import (
    PRO_LIMIT,
    CategoryResult,
    Curve,
    Picture,
    ScoredImage,
    summarize,
    to_json,
)
from npad.progress import task
from npad.scoring.fusion import resized

__all__ = ["CategoryResult", "Model", "Prediction", "evaluate", "score", "summarize", "to_json"]

_PICTURES = 8  # of good images, of defective images and of typical images each
_CURVE_POINTS = 200

Mask = tuple[NDArray[np.bool_], tuple[int, int] | None]  # at the metric size; its own size


class Prediction(Protocol):
    """What a model says about a few images."""

    @property
    def scores(self) -> NDArray[np.float64]:
        """Scores of the images, (N,)."""

    @property
    def maps(self) -> Sequence[NDArray[np.float32]]:
        """Anomaly maps, (H, W) each, at the size of their image."""

    @property
    def paths(self) -> Sequence[str]:
        """Paths of the images, as they were given."""

    @property
    def skipped(self) -> Sequence[tuple[str, str]]:
        """(path, reason) of images that could not be read."""


class Model(Protocol):
    """What is evaluated; `npad.NPad` is one. Attributes that end in ``_`` are what it learned."""

    @property
    def skipped_(self) -> Sequence[tuple[str, str]]:
        """(path, reason) of training images that could not be read."""

    def fit(self, source: Sequence[Path], *, skip_bad: bool = False) -> object:
        """Fit on defect-free images."""

    def predict_batches(
        self, source: Sequence[Path], *, skip_bad: bool = False
    ) -> Iterator[Prediction]:
        """Score images, batch by batch."""

    def settings(self) -> dict[str, Any]:
        """All arguments as JSON values, among them ``image_size``, (height, width)."""


def evaluate(
    model: Model,
    category: Category,
    *,
    metric_size: tuple[int, int] | None = None,
    skip_bad: bool = False,
    progress: bool | None = None,
) -> CategoryResult:
    """Fit the model on the category's training images and measure it on its test images.

    Parameters
    ----------
    model : `npad.NPad`, or anything with its ``fit``, ``predict_batches`` and ``settings``
    category : from `npad.evaluation.datasets.find_categories`
    metric_size : (height, width) to which maps are resized bilinearly and masks by nearest pixel
        before the pixel metrics; None is the model's ``image_size``
    skip_bad : go on after an image that cannot be read, and list it in the result
    progress : False shows no bar while metrics are computed; the model shows its own

    Returns
    -------
    CategoryResult

    Raises
    ------
    ValueError  a mask has not the size of its image, or no test image could be scored.
    ImageError  an image or a mask cannot be read. Masks are read before anything is fitted.

    Notes
    -----
    Memory: the test set's maps at the metric size, float32, and once more while they are ranked.
    """
    size = _metric_size(model, metric_size)
    masks = _read_masks(category.test, size)
    start = time.perf_counter()
    model.fit(category.train, skip_bad=skip_bad)
    fit_seconds = time.perf_counter() - start
    return _score(model, category, size, masks, fit_seconds, skip_bad, progress)


def score(
    model: Model,
    category: Category,
    *,
    metric_size: tuple[int, int] | None = None,
    skip_bad: bool = False,
    progress: bool | None = None,
) -> CategoryResult:
    """As `evaluate`, for a model that is fitted already; ``fit_seconds`` is NaN."""
    size = _metric_size(model, metric_size)
    masks = _read_masks(category.test, size)
    return _score(model, category, size, masks, math.nan, skip_bad, progress)


def _metric_size(model: Model, size: tuple[int, int] | None) -> tuple[int, int]:
    height, width = size or model.settings()["image_size"]
    if height < 1 or width < 1:
        raise ValueError(f"evaluate: metric_size must be positive, got {height} x {width}")
    return height, width


def _read_masks(samples: Sequence[Sample], size: tuple[int, int]) -> list[Mask]:
    masks: list[Mask] = []
    for sample in samples:
        if sample.mask_path is not None:
            mask = read_mask(sample.mask_path)
            rows, columns = (
                ((np.arange(n) + 0.5) * own / n).astype(np.intp)
                for n, own in zip(size, mask.shape, strict=True)
            )
            masks.append((mask[rows[:, None], columns], (mask.shape[0], mask.shape[1])))
        elif sample.is_anomalous:
            raise ValueError(f"{sample.path}: a defective image needs a mask")
        else:
            masks.append((np.zeros(size, dtype=bool), None))
    return masks


def _score(
    model: Model,
    category: Category,
    size: tuple[int, int],
    masks: list[Mask],
    fit_seconds: float,
    skip_bad: bool,
    progress: bool | None,
) -> CategoryResult:
    position = {str(sample.path): i for i, sample in enumerate(category.test)}
    scores: dict[int, float] = {}
    maps = np.empty((len(category.test), *size), dtype=np.float32)
    skipped = list(model.skipped_)
    predict_seconds = 0.0
    batches = model.predict_batches([sample.path for sample in category.test], skip_bad=skip_bad)
    while True:
        start = time.perf_counter()
        batch = next(batches, None)
        predict_seconds += time.perf_counter() - start
        if batch is None:
            break
        skipped += batch.skipped
        for path, value, own_map in zip(batch.paths, batch.scores, batch.maps, strict=True):
            i = position[str(path)]
            mask_size = masks[i][1]
            if mask_size is not None and mask_size != own_map.shape:
                raise ValueError(
                    f"{category.test[i].mask_path} is {mask_size[0]} x {mask_size[1]} pixels but"
                    f" {path} is {own_map.shape[0]} x {own_map.shape[1]} (height x width);"
                    " a mask must have the size of its image"
                )
            scores[i] = float(value)
            (maps[i],) = resized(torch.from_numpy(own_map)[None], [size])
    if not scores:
        raise ValueError(f"{category.name}: none of its test images could be scored")
    scored = sorted(scores)
    images = [
        ScoredImage(category.test[i].path, category.test[i].defect_type, scores[i]) for i in scored
    ]
    return CategoryResult(
        name=category.name,
        n_train=len(category.train) - len(model.skipped_),
        images=images,
        metric_size=size,
        fit_seconds=fit_seconds,
        predict_seconds=predict_seconds,
        model_bytes=getattr(model, "nbytes", None),
        settings=model.settings(),
        fitted={
            name: value
            for name, value in sorted(vars(model).items())
            if name.endswith("_") and isinstance(value, int | float | str | tuple)
        },
        skipped=skipped,
        **_measure(
            category.name,
            images,
            [maps[i] for i in scored],
            [masks[i][0] for i in scored],
            progress,
        ),
    )


def _measure(
    name: str,
    images: list[ScoredImage],
    maps: list[NDArray[np.float32]],
    masks: list[NDArray[np.bool_]],
    progress: bool | None,
) -> dict[str, Any]:
    scores = np.array([image.score for image in images])
    kinds = np.array([image.defect_type for image in images])
    anomalous = kinds != GOOD
    _, threshold = metrics.best_f1(anomalous, scores)
    missed, false_alarms = anomalous & (scores < threshold), ~anomalous & (scores >= threshold)

    defect_types = sorted(set(kinds[anomalous].tolist()))
    types = {}
    with task(f"{name}: metrics", len(defect_types) + 1, enabled=progress) as advance:
        everything = metrics.rank_pixels(masks, maps)
        advance()
        for kind in defect_types:
            chosen = np.flatnonzero(~anomalous | (kinds == kind))
            ranking = metrics.rank_pixels([masks[i] for i in chosen], [maps[i] for i in chosen])
            types[kind] = {
                **metrics.image_metrics(anomalous[chosen], scores[chosen]),
                **ranking.metrics(PRO_LIMIT),
                "n_images": int(np.sum(kinds == kind)),
                "n_regions": ranking.n_regions,
                "n_missed": int(np.sum(missed & (kinds == kind))),
            }
            advance()
    low = float(np.median([m for m, bad in zip(maps, anomalous, strict=True) if not bad] or maps))
    high = max(float(np.quantile(np.stack(maps), 0.999)), np.nextafter(low, np.inf))
    pictures = []
    for group, i in _pick(scores, kinds):
        levels = np.clip((maps[i] - low) / (high - low), 0, 1)
        pictures.append(Picture(images[i], group, np.rint(255 * levels).astype(np.uint8), masks[i]))
    empty = sum(bad and not mask.any() for bad, mask in zip(anomalous, masks, strict=True))
    return {
        "metrics": {
            **metrics.image_metrics(anomalous, scores),
            **everything.metrics(PRO_LIMIT),
        },
        "types": types,
        "threshold": threshold,
        "n_false_alarms": int(false_alarms.sum()),
        "n_missed": int(missed.sum()),
        "curves": {
            "roc": _thin(metrics.roc_curve(anomalous, scores)),
            "pixel_roc": _thin(everything.roc_curve()),
            "pro": _thin(everything.pro_curve(), PRO_LIMIT),
        },
        "color_range": (low, high),
        "pictures": pictures,
        "notes": [
            f"{empty} defective image{'s have' if empty > 1 else ' has'} an empty mask at this"
            " size: their pixels count as nominal."
        ]
        if empty
        else [],
    }


def _pick(scores: NDArray[np.float64], kinds: NDArray[np.str_]) -> list[tuple[str, int]]:
    """Choose images for the report: the worst of both kinds, then the median one of each type."""
    order = np.argsort(scores, kind="stable")
    good = [int(i) for i in order[::-1] if kinds[i] == GOOD][:_PICTURES]
    bad = [int(i) for i in order if kinds[i] != GOOD][:_PICTURES]
    worst = [*(("good", i) for i in good), *(("defective", i) for i in bad)]
    typical = []
    for kind in sorted(set(kinds.tolist()), key=lambda kind: (kind != GOOD, kind)):
        ranked = [int(i) for i in order if kinds[i] == kind]
        if ranked[len(ranked) // 2] not in {*good, *bad}:
            typical.append(("typical", ranked[len(ranked) // 2]))
    return worst + typical[:_PICTURES]


def _thin(curve: Curve, limit: float = 1.0) -> Curve:
    """Cut the curve at x = limit and keep points that are evenly spaced along its length."""
    x, y = curve
    if not len(x):
        return curve
    inside = int(np.searchsorted(x, limit, side="right"))
    end = np.interp(limit, x[inside - 1 : inside + 1], y[inside - 1 : inside + 1])
    x, y = np.append(x[:inside], limit), np.append(y[:inside], end)
    length = np.concatenate([[0.0], np.cumsum(np.abs(np.diff(x)) / limit + np.abs(np.diff(y)))])
    kept = np.unique(np.searchsorted(length, np.linspace(0, length[-1], _CURVE_POINTS)))
    return x[kept], y[kept]
