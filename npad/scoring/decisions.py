"""From scores to decisions, by what nominal images scored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from npad.calibration import Calibration, GroupedCalibration, UnknownGroupError
from npad.nominal_scores import Group, NominalScores
from npad.settings import Settings

__all__ = [
    "Decide",
    "Decider",
    "Decisions",
    "GroupOf",
    "Groups",
    "NotCalibratedError",
    "Thresholds",
    "decide_by",
    "group_of_each",
]

Groups: TypeAlias = "Group | Sequence[Group]"  # of all images, or of each
Thresholds: TypeAlias = "float | dict[Group, float]"  # of all images, or of each group
GroupOf: TypeAlias = "Callable[[int], Group]"  # the group of an image by its position in the source
Decide: TypeAlias = "Callable[[NDArray[np.float64], Sequence[int]], Decisions]"  # scores, positions


class NotCalibratedError(RuntimeError, AttributeError):
    """A decision is asked of a model that has not been calibrated, or was with other settings."""


@dataclass(frozen=True, eq=False)
class Decisions:
    """What is decided about N images.

    Attributes
    ----------
    p_values : (N,) float64, see `npad.calibration.Calibration.p_values`
    thresholds : (N,) float64, above which the score of each image is an alarm
    map_thresholds : (N,) float64, above which a pixel of each map is marked
    """

    p_values: NDArray[np.float64]
    thresholds: NDArray[np.float64]
    map_thresholds: NDArray[np.float64]

    @classmethod
    def joined(cls, parts: Sequence[Decisions]) -> Decisions:
        """All parts as one."""
        names = ("p_values", "thresholds", "map_thresholds")
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


class Decider:
    """Decides by the scores of nominal images.

    Parameters
    ----------
    nominal : what they scored
    settings : of the model as it scores now; ``false_alarm_rate`` and ``confidence`` are kept

    Attributes
    ----------
    threshold : above it a score is an alarm; of each group, where there are groups
    map_threshold : above it a pixel is marked: of nominal images at most ``false_alarm_rate`` have any

    Raises
    ------
    NotCalibratedError
        The settings give other scores now.
    ValueError
        Too few images for what is asked.
    """

    def __init__(self, nominal: NominalScores, settings: Settings) -> None:
        for name, now in settings.scoring.items():
            then = nominal.scoring.get(name)
            if then != now:
                raise NotCalibratedError(
                    f"NPad: the model was calibrated with {name}={then!r}, and {name}={now!r} gives "
                    "other scores: calibrate again, or set it back"
                )
        asked = settings.false_alarm_rate, settings.confidence
        self.threshold: Thresholds
        self.map_threshold: Thresholds
        self._scores: Calibration | GroupedCalibration
        if nominal.groups is None:
            self._scores = Calibration(nominal.scores)
            self.threshold = self._scores.threshold(*asked)
            self.map_threshold = Calibration(nominal.map_maxima).threshold(*asked)
        else:
            self._scores = GroupedCalibration(nominal.scores, nominal.groups)
            maxima = GroupedCalibration(nominal.map_maxima, nominal.groups)
            names = list(dict.fromkeys(nominal.groups))
            of_scores, of_maps = (
                calibration.thresholds(names, *asked).tolist()
                for calibration in (self._scores, maxima)
            )
            self.threshold = dict(zip(names, of_scores, strict=True))
            self.map_threshold = dict(zip(names, of_maps, strict=True))

    def check(self, group: Group) -> None:
        """Look whether a group is known.

        Raises
        ------
        UnknownGroupError
            It was not calibrated.
        """
        assert isinstance(self.threshold, dict)
        if group not in self.threshold:
            raise UnknownGroupError(group, self.threshold)

    def decide(
        self, scores: NDArray[np.float64], groups: Sequence[Group] | None = None
    ) -> Decisions:
        """Decide about images.

        Parameters
        ----------
        scores : (N,) float64
        groups : the group of each image, where the calibration has groups

        Raises
        ------
        UnknownGroupError
            A group that was not calibrated.
        """
        if isinstance(self._scores, Calibration):
            p_values = self._scores.p_values(scores)
        else:
            assert groups is not None
            p_values = self._scores.p_values(scores, groups)
        return Decisions(
            p_values, *(_of(x, groups, len(scores)) for x in (self.threshold, self.map_threshold))
        )


def _of(thresholds: Thresholds, groups: Sequence[Group] | None, n: int) -> NDArray[np.float64]:
    """The threshold of each image."""
    if isinstance(thresholds, dict):
        return np.array([thresholds[group] for group in groups or ()], np.float64)
    return np.full(n, thresholds)


def decide_by(
    nominal: NominalScores | None, settings: Settings, groups: Groups | None, n_images: int | None
) -> Decide | None:
    """How scores of images become decisions; None where the model is not calibrated.

    Parameters
    ----------
    nominal : what nominal images scored
    settings : as for `Decider`
    groups : one of all images, a list of one for each, or none, as the calibration has groups
    n_images : in the source, if it is known

    Raises
    ------
    NotCalibratedError
        As `Decider`.
    ValueError
        Groups where there are none, or none where there are; groups that are not such, or were not
        calibrated (UnknownGroupError); too few images in the calibration for what is asked.
    """
    if nominal is None or nominal.groups is None:
        if groups is not None:
            how = "is not calibrated" if nominal is None else "was calibrated without groups"
            raise ValueError(
                f"NPad.predict: groups are of use where a model was calibrated in groups, and this one "
                f"{how}; leave them out, or calibrate with groups"
            )
        if nominal is None:
            return None
        decider = Decider(nominal, settings)
        return lambda scores, _: decider.decide(scores)
    decider = Decider(nominal, settings)
    if groups is None:
        known = ", ".join(map(repr, sorted(set(nominal.groups), key=str)))
        raise ValueError(
            f"NPad.predict: the model was calibrated in groups ({known}); say with groups= of which "
            "the images are"
        )
    of = group_of_each("NPad.predict", groups, n_images)
    for group in dict.fromkeys(map(of, range(1 if n_images is None else n_images))):
        decider.check(group)
    return lambda scores, indices: decider.decide(scores, [of(i) for i in indices])


def group_of_each(call: str, groups: Groups, n_images: int | None) -> GroupOf:
    """The group of an image by its position in the source.

    Raises
    ------
    ValueError
        Groups that are none, or not one for each image.
    """
    if _is_group(groups):
        return lambda _: groups  # type: ignore[return-value]
    if not isinstance(groups, list | tuple) or not all(map(_is_group, groups)):
        raise ValueError(
            f"{call}: groups must be a text, a whole number, or a list of one for each image, got "
            f"{groups!r:.80}"
        )
    if n_images is None:
        raise ValueError(
            f"{call}: groups is a list, and how many images the source holds is not known before; "
            "give one group, or a list of images"
        )
    if len(groups) != n_images:
        raise ValueError(f"{call}: groups has {len(groups)} entries for {n_images} images")
    return groups.__getitem__


def _is_group(value: Any) -> bool:
    return isinstance(value, str | int) and not isinstance(value, bool) and value != ""
