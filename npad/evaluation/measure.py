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
from numpy.typing import NDArray

from npad.evaluation import metrics
from npad.evaluation.calibrated import Calibrated, Decision, judge
from npad.evaluation.datasets import GOOD, Category
from npad.evaluation.metrics import Curve, PixelRanking
from npad.evaluation.results import PRO_LIMIT, CategoryResult, Picture, ScoredImage
from npad.evaluation.truth import Truth, read_truth, wrong_size
from npad.nominal_scores import NominalScores
from npad.progress import task
from npad.scoring.decisions import Decisions
from npad.scoring.prediction import Prediction
from npad.settings import MAX_PIXELS

__all__ = ["Model", "evaluate", "score"]

_PICTURES = 8  # of good images, of defective images and of typical images each
_CURVE_POINTS = 200
_NO_CURVE = np.empty(0), np.empty(0)


class Model(Protocol):
    """What is evaluated; `npad.NPad` is one. Attributes that end in ``_`` are what it learned.

    One whose predictions have ``decisions`` also has ``false_alarm_rate`` and ``confidence`` among its
    settings.
    """

    @property
    def skipped_(self) -> Sequence[tuple[str, str]]:
        """(path, reason) of training images that could not be read."""

    @property
    def calibration_(self) -> NominalScores | None:
        """What its decisions rest on; asked for where there are some."""

    def fit(
        self, source: Sequence[Path], *, skip_bad: bool = False, statistics: bool = True
    ) -> object:
        """Fit on defect-free images; without statistics it need not go on afterwards."""

    def predict_batches(
        self, source: Sequence[Path], *, skip_bad: bool = False, map_size: tuple[int, int]
    ) -> Iterator[Prediction]:
        """Score images, batch by batch, with maps of this (height, width)."""

    def settings(self) -> dict[str, Any]:
        """All arguments as JSON values."""

    def input_size(
        self, source: Sequence[Path] | None = None, *, skip_bad: bool = False
    ) -> tuple[int, int]:
        """(height, width) to which it resizes images; of a source, once it is fitted to that."""


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
    model : `npad.NPad`, or anything that has what `Model` has
    category : from `npad.evaluation.datasets.find_categories`
    metric_size : (height, width) of maps and masks in the pixel metrics. The model gives its maps at
        this size; a mask is resampled by nearest pixel. None is the model's ``input_size``, at which
        maps are as they were computed.
    skip_bad : go on after an image that cannot be read, and list it in the result
    progress : False shows no bar while metrics are computed; the model shows its own

    Returns
    -------
    CategoryResult, whose pixel metrics are NaN where the category has no masks

    Raises
    ------
    ValueError
        A mask has not the size of its image, or no test image could be scored.
    DatasetError
        The mask of a good image marks a defect.
    ImageError
        An image or a mask cannot be read. Masks are read before anything is fitted.

    Notes
    -----
    Memory: the test set's maps at the metric size, float32, and once more while they are ranked.
    """
    size = metric_size or model.input_size(category.train, skip_bad=skip_bad)
    truth = read_truth(category, _checked(size), _max_pixels(model))
    start = time.perf_counter()
    model.fit(category.train, skip_bad=skip_bad, statistics=False)
    fit_seconds = time.perf_counter() - start
    return _score(model, category, truth, fit_seconds, skip_bad, progress)


def score(
    model: Model,
    category: Category,
    *,
    metric_size: tuple[int, int] | None = None,
    skip_bad: bool = False,
    progress: bool | None = None,
) -> CategoryResult:
    """As `evaluate`, for a model that is fitted already; ``fit_seconds`` is NaN."""
    size = metric_size or model.input_size()
    truth = read_truth(category, _checked(size), _max_pixels(model))
    return _score(model, category, truth, math.nan, skip_bad, progress)


def _checked(size: tuple[int, int]) -> tuple[int, int]:
    height, width = size
    if height < 1 or width < 1:
        raise ValueError(f"evaluate: metric_size must be positive, got {height} x {width}")
    return height, width


def _max_pixels(model: Model) -> int:
    return int(getattr(model, "max_pixels", MAX_PIXELS))


def _score(
    model: Model,
    category: Category,
    truth: Truth,
    fit_seconds: float,
    skip_bad: bool,
    progress: bool | None,
) -> CategoryResult:
    paths = [sample.path for sample in category.test]
    position = {str(path): i for i, path in enumerate(paths)}
    scores: dict[int, float] = {}
    decisions: dict[int, Decision] = {}
    maps = np.empty((len(paths), *truth.size), dtype=np.float32)
    skipped = list(model.skipped_)
    n_unaligned = 0
    predict_seconds = 0.0
    batches = model.predict_batches(paths, skip_bad=skip_bad, map_size=truth.size)
    while True:
        start = time.perf_counter()
        batch = next(batches, None)
        predict_seconds += time.perf_counter() - start
        if batch is None:
            break
        skipped += batch.skipped
        n_unaligned += len(batch.unaligned)
        if batch.decisions is not None:
            own = _decisions(batch, batch.decisions)
            decisions.update(zip((position[path] for path in batch.paths), own, strict=True))
        for path, value, own_map, size in zip(
            batch.paths, batch.scores, batch.maps, batch.sizes, strict=True
        ):
            i = position[path]
            mask_size = truth.own_sizes.get(i, size)
            if mask_size != size:
                raise wrong_size(category.test[i], mask_size, size, 1)
            scores[i], maps[i] = float(value), own_map
    if not scores:
        raise ValueError(f"{category.name}: none of its test images could be scored")
    scored = sorted(scores)
    images = [
        ScoredImage(
            category.test[i].path, category.test[i].defect_type, scores[i], decisions.get(i)
        )
        for i in scored
    ]
    return CategoryResult(
        name=category.name,
        n_train=len(category.train) - len(model.skipped_),
        images=images,
        has_masks=category.has_masks,
        metric_size=truth.size,
        fit_seconds=fit_seconds,
        predict_seconds=predict_seconds,
        model_bytes=getattr(model, "nbytes", None),
        settings=model.settings(),
        fitted={
            name: "; ".join(map(str, value)) if name == "members_" else value
            for name, value in sorted(vars(model).items())
            if name == "members_" or (name.endswith("_") and isinstance(value, int | float | str))
        },
        skipped=skipped,
        **_measure(
            category.name,
            images,
            [maps[i] for i in scored],
            [truth.masks[i] for i in scored] if category.has_masks else None,
            progress,
        ),
        notes=[
            *_notes(category, truth, scored),
            *truth.notes,
            *_unaligned_note(n_unaligned, len(scored)),
        ],
        calibrated=_calibrated(model, images),
    )


def _decisions(batch: Prediction, decided: Decisions) -> Iterator[Decision]:
    """Of each image of the batch."""
    values = (
        decided.p_values,
        decided.thresholds,
        batch.labels,
        batch.map_maxima,
        decided.map_thresholds,
    )
    for of_image in zip(*(array.tolist() for array in values), strict=True):
        yield Decision(*of_image)


def _calibrated(model: Model, images: Sequence[ScoredImage]) -> Calibrated | None:
    decisions = [image.decision for image in images if image.decision is not None]
    if not decisions or model.calibration_ is None:
        return None
    asked = model.settings()
    return judge(
        [image.defect_type for image in images],
        [image.score for image in images],
        decisions,
        model.calibration_,
        asked["false_alarm_rate"],
        asked["confidence"],
    )


def _unaligned_note(n_unaligned: int, n_scored: int) -> list[str]:
    if not n_unaligned:
        return []
    return [
        f"{n_unaligned} of {n_scored} test images could not be registered to the template and were "
        "scored as they came"
    ]


def _measure(
    name: str,
    images: list[ScoredImage],
    maps: list[NDArray[np.float32]],
    masks: list[NDArray[np.bool_]] | None,
    progress: bool | None,
) -> dict[str, Any]:
    scores = np.array([image.score for image in images])
    kinds = np.array([image.defect_type for image in images])
    anomalous = kinds != GOOD
    _, threshold = metrics.best_f1(anomalous, scores)
    missed, false_alarms = anomalous & (scores < threshold), ~anomalous & (scores >= threshold)

    def measured(chosen: NDArray[np.bool_]) -> tuple[dict[str, float], PixelRanking | None]:
        figures = metrics.image_metrics(anomalous[chosen], scores[chosen])
        if masks is None:
            return figures | dict.fromkeys(metrics.PIXEL_METRICS, math.nan), None
        of = np.flatnonzero(chosen)
        ranking = metrics.rank_pixels([masks[i] for i in of], [maps[i] for i in of])
        return figures | ranking.metrics(PRO_LIMIT), ranking

    defect_types = sorted(set(kinds[anomalous].tolist()))
    types = {}
    with task(f"{name}: metrics", len(defect_types) + 1, enabled=progress) as advance:
        figures, everything = measured(np.ones_like(anomalous))
        advance()
        for kind in defect_types:
            of_kind, ranking = measured(~anomalous | (kinds == kind))
            types[kind] = {
                **of_kind,
                "n_images": int(np.sum(kinds == kind)),
                "n_regions": ranking.n_regions if ranking else math.nan,
                "n_missed": int(np.sum(missed & (kinds == kind))),
            }
            advance()
    low = float(
        np.nanmedian([m for m, bad in zip(maps, anomalous, strict=True) if not bad] or maps)
    )
    high = max(float(np.nanquantile(np.stack(maps), 0.999)), np.nextafter(low, np.inf))
    pictures = []
    for group, i in _pick(scores, kinds):
        levels = np.nan_to_num(np.clip((maps[i] - low) / (high - low), 0, 1))
        mask = None if masks is None else masks[i]
        pictures.append(Picture(images[i], group, np.rint(255 * levels).astype(np.uint8), mask))
    return {
        "metrics": figures,
        "types": types,
        "threshold": threshold,
        "n_false_alarms": int(false_alarms.sum()),
        "n_missed": int(missed.sum()),
        "curves": {
            "roc": _thin(metrics.roc_curve(anomalous, scores)),
            "pixel_roc": _thin(everything.roc_curve() if everything else _NO_CURVE),
            "pro": _thin(everything.pro_curve() if everything else _NO_CURVE, PRO_LIMIT),
        },
        "color_range": (low, high),
        "pictures": pictures,
    }


def _notes(category: Category, truth: Truth, scored: Sequence[int]) -> list[str]:
    if not category.has_masks:
        return [
            "The data set has no masks that show where the defects are: whole images are measured,"
            " pixels are not."
        ]
    bare = [i for i in scored if category.test[i].is_anomalous and not truth.masks[i].any()]
    empty = sum(truth.is_empty[i] for i in bare)
    counts = {"an empty mask": empty, "an empty mask at this size": len(bare) - empty}
    return [
        f"{n} defective image{' has' if n == 1 else 's have'} {what}: their pixels count as nominal."
        for what, n in counts.items()
        if n
    ]


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
    x, y = metrics.cut(curve, limit)
    if not len(x):
        return x, y
    length = np.concatenate([[0.0], np.cumsum(np.abs(np.diff(x)) / limit + np.abs(np.diff(y)))])
    kept = np.unique(np.searchsorted(length, np.linspace(0, length[-1], _CURVE_POINTS)))
    return x[kept], y[kept]
