"""Scoring nominal images, for a calibration."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Collection, Mapping

import numpy as np

from npad.calibration import images_needed
from npad.images.fingerprints import fingerprints
from npad.images.source import Batch, ImageSource
from npad.nominal_scores import Group, NominalScores
from npad.scoring.decisions import GroupOf, Groups, group_of_each
from npad.scoring.pipeline import Run, predictions
from npad.settings import Settings

__all__ = ["check_number", "score_nominal"]

_CALL = "NPad.calibrate"
_NAMED = 3  # images that were fitted
_ALL = ""  # the group of all images, where there are no groups


def score_nominal(
    run: Run,
    images: ImageSource,
    settings: Settings,
    groups: Groups | None,
    fitted: Collection[str],
) -> NominalScores:
    """Score nominal images.

    Parameters
    ----------
    run, images : how, and which
    settings : of the model
    groups : one of all images, a list of one for each, or none
    fitted : fingerprints of the images that the model was fitted on

    Raises
    ------
    ValueError
        Too few images for ``false_alarm_rate``, told before the work where their number is known;
        groups that are not such.

    Warns
    -----
    UserWarning
        Images that were fitted.
    """
    of: GroupOf = (
        (lambda _: _ALL) if groups is None else group_of_each(_CALL, groups, images.n_images)
    )
    if images.n_images is not None:
        _check_sizes(_CALL, settings, Counter(map(of, range(images.n_images))))
    scores, maxima = [], []
    indices: list[int] = []
    known: list[str] = []  # that were fitted

    def look(batch: Batch) -> None:
        indices.extend(batch.indices)
        prints = fingerprints(batch.images[:, :3])
        known.extend(name for name, one in zip(batch.names, prints, strict=True) if one in fitted)

    for prediction in predictions(run, images, settings.progress, look=look):
        scores.append(prediction.scores)
        maxima.append(prediction.map_maxima)
    found = tuple(map(of, indices))
    none_left = {of(i): 0 for i in range(images.n_images or 1)}  # of a group that was skipped whole
    _check_sizes(_CALL, settings, none_left | Counter(found))
    if known:
        named = ", ".join(known[:_NAMED]) + (", ..." if len(known) > _NAMED else "")
        warnings.warn(
            f"{_CALL}: {len(known)} of {len(indices)} images were fitted ({named}): they score lower "
            "than others, and thresholds would give more false alarms than asked for; calibrate with "
            "images that were not fitted",
            stacklevel=3,
        )
    kept = None if groups is None else found
    return NominalScores(np.concatenate(scores), np.concatenate(maxima), kept, settings.scoring)


def check_number(call: str, settings: Settings, n_images: int) -> None:
    """Refuse too few images for ``false_alarm_rate`` and ``confidence``.

    Raises
    ------
    ValueError
        With the number that it takes.
    """
    _check_sizes(call, settings, {_ALL: n_images})


def _check_sizes(call: str, settings: Settings, sizes: Mapping[Group, int]) -> None:
    rate, confidence = settings.false_alarm_rate, settings.confidence
    needed = images_needed(rate, confidence)
    lacking = [
        str(n) if group == _ALL else f"{n} of group {group!r}"
        for group, n in sizes.items()
        if n < needed
    ]
    if lacking:
        sure = "" if confidence is None else f" with confidence={confidence:g}"
        each = "" if _ALL in sizes else " of each group"
        raise ValueError(
            f"{call}: to calibrate, false_alarm_rate={rate:g}{sure} needs {needed} nominal images"
            f"{each}, got {', '.join(lacking)}; give more, or set a higher rate"
        )
