"""What a model says about images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npad.scoring.decisions import Decisions, NotCalibratedError
from npad.scoring.regions import Region, find_regions

__all__ = ["Prediction"]


@dataclass
class Prediction:
    """Scores and anomaly maps of images, in their order; higher is more anomalous.

    Attributes
    ----------
    scores : (N,) float64, the maximum of each image's smoothed map at the model's resolution
    maps : N arrays (H, W) float32, each at the size that was asked for: by default its image's own; NaN
        outside the region of interest, if there is one
    paths : N names: the path, or ``image[i]`` for arrays
    sizes : N (height, width) of the images, as displayed
    skipped : (name, reason) of files that could not be read, with ``skip_bad=True``
    images : N arrays (H, W, 3), uint8 or float32 in [0, 1], as they were decoded, with
        ``keep_images=True``; else empty
    map_maxima : (N,) float64, the largest value of each map at the model's resolution
    decisions : p-values and thresholds of the images; None where the model is not calibrated
    unaligned : (name, reason) of images that a model with ``align`` could not register to its
        template: they are scored as they came
    """

    scores: NDArray[np.float64]
    maps: list[NDArray[np.float32]]
    paths: list[str]
    sizes: list[tuple[int, int]] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    images: list[NDArray[Any]] = field(default_factory=list)
    map_maxima: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    decisions: Decisions | None = None
    unaligned: list[tuple[str, str]] = field(default_factory=list)

    @property
    def p_values(self) -> NDArray[np.float64]:
        """(N,) float64: what share of nominal images scores as high, see `npad.calibration`.

        Raises
        ------
        NotCalibratedError
            The model is not calibrated.
        """
        return self._decided.p_values

    @property
    def labels(self) -> NDArray[np.bool_]:
        """(N,) bool: which images are anomalous, their score being above the threshold.

        Raises
        ------
        NotCalibratedError
            The model is not calibrated.
        """
        return self.scores > self._decided.thresholds

    @property
    def masks(self) -> list[NDArray[np.bool_]]:
        """N arrays (H, W) bool: the pixels of each map above its threshold.

        The threshold is that of maps: of nominal images, at most ``false_alarm_rate`` have any such
        pixel. It is another one than that of scores, which may be of other layers than the map.

        Raises
        ------
        NotCalibratedError
            The model is not calibrated.
        """
        thresholds = self._decided.map_thresholds
        return [map_ > threshold for map_, threshold in zip(self.maps, thresholds, strict=True)]

    @property
    def regions(self) -> list[list[Region]]:
        """Of each image, the connected parts of its mask in pixels of the image, highest peak first.

        Raises
        ------
        NotCalibratedError
            The model is not calibrated.
        """
        thresholds = self._decided.map_thresholds.tolist()
        return [
            find_regions(map_, threshold, size)
            for map_, threshold, size in zip(self.maps, thresholds, self.sizes, strict=True)
        ]

    @property
    def _decided(self) -> Decisions:
        if self.decisions is None:
            raise NotCalibratedError(
                "Prediction: the model was not calibrated, so that it cannot decide; call "
                "model.calibrate with nominal images that were not fitted, and predict again"
            )
        return self.decisions

    @classmethod
    def joined(cls, parts: Sequence[Prediction]) -> Prediction:
        """All parts as one."""
        decided = [part.decisions for part in parts if part.decisions is not None]
        return cls(
            np.concatenate([part.scores for part in parts] or [np.empty(0)]),
            [map_ for part in parts for map_ in part.maps],
            [path for part in parts for path in part.paths],
            [size for part in parts for size in part.sizes],
            [item for part in parts for item in part.skipped],
            [image for part in parts for image in part.images],
            np.concatenate([part.map_maxima for part in parts] or [np.empty(0)]),
            Decisions.joined(decided) if decided else None,
            [item for part in parts for item in part.unaligned],
        )
