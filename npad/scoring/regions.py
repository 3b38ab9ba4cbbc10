"""Regions: the connected parts of a map that lie above a threshold."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

__all__ = ["Region", "find_regions"]

_TOUCHING = np.ones((3, 3), dtype=bool)  # corners count


@dataclass(frozen=True)
class Region:
    """A connected part of a map above its threshold, in pixels of its image.

    Attributes
    ----------
    area : pixels
    box : (left, top, width, height) of the smallest rectangle that holds it
    peak : the largest value of the map in it
    peak_at : (x, y), where that is
    """

    area: int
    box: tuple[int, int, int, int]
    peak: float
    peak_at: tuple[int, int]

    def to_json(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self)


def find_regions(
    map_: NDArray[np.float32], threshold: float, size: tuple[int, int]
) -> list[Region]:
    """Find the regions of a map, highest peak first.

    Parameters
    ----------
    map_ : (h, w) float32; NaN is never above a threshold
    threshold : above which a pixel belongs to a region; pixels that touch at a corner are connected
    size : (height, width) of the image. A map of another size is measured as it is, and what is found
        is told in pixels of the image: an area to the nearest, a box so that nothing is cut off.
    """
    above = map_ > threshold
    if not above.any():
        return []
    labels, n = ndimage.label(above, structure=_TOUCHING)
    areas = np.bincount(labels.ravel(), minlength=n + 1)
    peaks = ndimage.maximum_position(np.where(above, map_, -np.inf), labels, range(1, n + 1))
    down, across = size[0] / map_.shape[0], size[1] / map_.shape[1]
    found = []
    for i, ((rows, columns), (y, x)) in enumerate(
        zip(ndimage.find_objects(labels), peaks, strict=True), start=1
    ):
        top, left = math.floor(rows.start * down), math.floor(columns.start * across)
        bottom, right = math.ceil(rows.stop * down), math.ceil(columns.stop * across)
        found.append(
            Region(
                area=max(1, round(float(areas[i]) * down * across)),
                box=(left, top, right - left, bottom - top),
                peak=float(map_[y, x]),
                peak_at=(int((x + 0.5) * across), int((y + 0.5) * down)),
            )
        )
    return sorted(found, key=lambda region: -region.peak)
