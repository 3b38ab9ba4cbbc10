"""What a model says about images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Prediction"]


@dataclass
class Prediction:
    """Scores and anomaly maps of images, in their order; higher is more anomalous.

    Attributes
    ----------
    scores : (N,) float64, the maximum of each image's smoothed map at the model's resolution
    maps : N arrays (H, W) float32, each at the size that was asked for: by default its image's own
    paths : N names: the path, or ``image[i]`` for arrays
    sizes : N (height, width) of the images, as displayed
    skipped : (name, reason) of files that could not be read, with ``skip_bad=True``
    images : N arrays (H, W, 3), uint8 or float32 in [0, 1], as they were decoded, with
        ``keep_images=True``; else empty
    """

    scores: NDArray[np.float64]
    maps: list[NDArray[np.float32]]
    paths: list[str]
    sizes: list[tuple[int, int]] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    images: list[NDArray[Any]] = field(default_factory=list)

    @classmethod
    def joined(cls, parts: Sequence[Prediction]) -> Prediction:
        """All parts as one."""
        return cls(
            np.concatenate([part.scores for part in parts] or [np.empty(0)]),
            [map_ for part in parts for map_ in part.maps],
            [path for part in parts for path in part.paths],
            [size for part in parts for size in part.sizes],
            [item for part in parts for item in part.skipped],
            [image for part in parts for image in part.images],
        )
