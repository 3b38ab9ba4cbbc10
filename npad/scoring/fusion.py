"""From distances on the grid to anomaly maps: how they are fused, smoothed and resized."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from npad import ops
from npad.learned import Standardization
from npad.settings import FUSIONS, uses_gaussians, uses_nominal_set


def fusion_arguments(
    mahalanobis: Tensor | None,
    euclidean: Tensor | None,
    fusion: str,
    weight: float = 0.4,
    standardization: Standardization | None = None,
) -> tuple[Tensor | None, Tensor | None, bool, tuple[float, float, float]]:
    """The first four arguments of ``ops.anomaly_map`` that fuse the maps M and E in a given way.

    Parameters
    ----------
    mahalanobis, euclidean : (N, h, w) distances; None for one that the fusion does not use.
    fusion : "product" (M^weight E^(1-weight)), "sum" (weight times M plus 1 - weight times E, both
        standardised), "mahalanobis" or "euclidean" (that map alone).
    weight : share of M in "product" and "sum", from 0 to 1.
    standardization : needed by "sum".

    Raises
    ------
    ValueError
        Unknown fusion, weight outside [0, 1], a missing map or standardization, a standard deviation
        that is not above 0.
    """
    if fusion not in FUSIONS:
        raise ValueError(f"fusion must be one of {', '.join(FUSIONS)}, got {fusion!r}")
    if not 0 <= weight <= 1:
        raise ValueError(f"weight must be between 0 and 1, got {weight}")
    if uses_gaussians(fusion) and mahalanobis is None:
        raise ValueError(f"fusion {fusion!r} needs the Mahalanobis map")
    if uses_nominal_set(fusion) and euclidean is None:
        raise ValueError(f"fusion {fusion!r} needs the Euclidean map, which needs a nominal set")
    if fusion == "mahalanobis":
        return mahalanobis, None, False, (1.0, 0.0, 0.0)
    if fusion == "euclidean":
        return None, euclidean, False, (0.0, 1.0, 0.0)
    if fusion == "product":
        return mahalanobis, euclidean, True, (weight, 1 - weight, 0.0)
    if standardization is None:
        raise ValueError("fusion 'sum' needs standardization, measured on held-out nominal images")
    s = standardization
    if not (s.mahalanobis_std > 0 and s.euclidean_std > 0):
        raise ValueError(
            "fusion 'sum' needs standard deviations above 0, got "
            f"{s.mahalanobis_std} and {s.euclidean_std}"
        )
    a, b = weight / s.mahalanobis_std, (1 - weight) / s.euclidean_std
    return mahalanobis, euclidean, False, (a, b, -a * s.mahalanobis_mean - b * s.euclidean_mean)


def smoothing_sigma(image_size: tuple[int, int]) -> float:
    """Standard deviation of the smoothing in pixels: 4 where the shorter side is 256."""
    return 4.0 * min(image_size) / 256


def resized(maps: Tensor, sizes: Sequence[tuple[int, int]]) -> list[NDArray[np.float32]]:
    """Maps (N, H, W) float32, each at its own size (height, width), bilinearly; see `cut`."""
    return cut(ops.resize_maps(maps, sizes).cpu(), sizes)


def cut(flat: Tensor, sizes: Sequence[tuple[int, int]]) -> list[NDArray[np.float32]]:
    """The maps that ``ops.resize_maps`` has put one after another.

    They are views of one array, which holds them all for as long as one of them is in use.
    """
    ends = list(accumulate(height * width for height, width in sizes))
    parts = np.split(flat.numpy(), ends[:-1]) if ends else []
    return [part.reshape(size) for part, size in zip(parts, sizes, strict=True)]
