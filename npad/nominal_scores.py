"""Scores of nominal images that a model was not fitted on: what its decisions rest on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["Group", "NominalScores"]

Group: TypeAlias = "str | int"  # as JSON gives it back


@dataclass(frozen=True, eq=False)
class NominalScores:
    """Scores of nominal images that a model was not fitted on.

    Attributes
    ----------
    scores : (n,) float64
    map_maxima : (n,) float64, the largest value of each map at the model's size
    groups : n names or numbers, the group of each image; None where no groups are told apart
    scoring : the settings that change scores, as they were
    """

    scores: NDArray[np.float64]
    map_maxima: NDArray[np.float64]
    groups: tuple[Group, ...] | None
    scoring: Mapping[str, Any]

    def __str__(self) -> str:
        of = "" if self.groups is None else f" in {len(set(self.groups))} groups"
        return f"{len(self.scores)} nominal images{of}"

    def to_json(self) -> dict[str, Any]:
        """As JSON types, from which the values come back bit for bit."""
        return {
            "scores": self.scores.tolist(),
            "map_maxima": self.map_maxima.tolist(),
            "groups": None if self.groups is None else list(self.groups),
            "scoring": dict(self.scoring),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any] | None) -> NominalScores | None:
        """What `to_json` was called on; None where there is none.

        Raises
        ------
        KeyError
            These are no such values.
        TypeError
            As KeyError.
        ValueError
            As KeyError.
        """
        if values is None:
            return None
        scores, maxima = (np.array(values[name], float) for name in ("scores", "map_maxima"))
        groups = None if values["groups"] is None else tuple(values["groups"])
        sizes = {scores.shape, maxima.shape, (len(scores if groups is None else groups),)}
        whole = all(isinstance(group, str | int) for group in groups or ())
        if len(sizes) > 1 or not len(scores) or not whole or not np.isfinite(scores + maxima).all():
            raise ValueError("calibration is none")
        return cls(scores, maxima, groups, dict(values["scoring"]))
