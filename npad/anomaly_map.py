"""From distances on the grid to anomaly maps: fuse, upsample, smooth, resize."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Final, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

FUSIONS: Final = ("product", "sum", "mahalanobis", "euclidean")
_TRUNCATE: Final = 4.0  # standard deviations at which the smoothing kernel ends


@dataclass(frozen=True)
class Standardization:
    """Mean and standard deviation of both maps on nominal images held out from the fit."""

    mahalanobis_mean: float
    mahalanobis_std: float
    euclidean_mean: float
    euclidean_std: float

    @classmethod
    def of(cls, mahalanobis: Tensor, euclidean: Tensor) -> Standardization:
        """Measure both maps (any shape, two values or more)."""
        return cls(*(float(f(x.double())) for x in (mahalanobis, euclidean) for f in _MOMENTS))


_MOMENTS: Final = (torch.mean, torch.std)


def fuse(
    mahalanobis: Tensor | None,
    euclidean: Tensor | None,
    fusion: str,
    weight: float = 0.4,
    standardization: Standardization | None = None,
) -> Tensor:
    """Join the Mahalanobis map M and the Euclidean map E into one.

    Parameters
    ----------
    mahalanobis, euclidean : (N, h, w) distances; None for one that the fusion does not use.
    fusion : "product" (M^weight E^(1-weight)), "sum" (weight times M plus 1 - weight times E, both
        standardised), "mahalanobis" or "euclidean" (that map alone).
    weight : share of M in "product" and "sum", from 0 to 1.
    standardization : needed by "sum".

    Returns
    -------
    (N, h, w); a higher value is more anomalous. The sum may be negative.

    Raises
    ------
    ValueError  unknown fusion, weight outside [0, 1], shapes that differ, a missing map or
        standardization.
    """
    if fusion not in FUSIONS:
        raise ValueError(f"fusion must be one of {', '.join(FUSIONS)}, got {fusion!r}")
    if not 0 <= weight <= 1:
        raise ValueError(f"weight must be between 0 and 1, got {weight}")
    if fusion != "euclidean" and mahalanobis is None:
        raise ValueError(f"fusion {fusion!r} needs the Mahalanobis map")
    if fusion != "mahalanobis" and euclidean is None:
        raise ValueError(f"fusion {fusion!r} needs the Euclidean map, which needs a nominal set")
    if mahalanobis is None or euclidean is None or fusion in ("mahalanobis", "euclidean"):
        return cast(Tensor, euclidean if fusion == "euclidean" else mahalanobis)
    if mahalanobis.shape != euclidean.shape:
        shapes = f"{tuple(mahalanobis.shape)} and {tuple(euclidean.shape)}"
        raise ValueError(f"the Mahalanobis and Euclidean maps differ in shape: {shapes}")
    if fusion == "product":
        return mahalanobis**weight * euclidean ** (1 - weight)
    if standardization is None:
        raise ValueError("fusion 'sum' needs standardization, measured on held-out nominal images")
    s = standardization
    m = (mahalanobis - s.mahalanobis_mean) / s.mahalanobis_std
    e = (euclidean - s.euclidean_mean) / s.euclidean_std
    return weight * m + (1 - weight) * e


def smoothing_sigma(image_size: tuple[int, int]) -> float:
    """Standard deviation of the smoothing in pixels: 4 where the shorter side is 256."""
    return 4.0 * min(image_size) / 256


def upsample_and_smooth(maps: Tensor, image_size: tuple[int, int], sigma: float) -> Tensor:
    """Bring maps to the model's input size and smooth them.

    Parameters
    ----------
    maps : (N, h, w) float32.
    image_size : (H, W).
    sigma : standard deviation of the Gaussian in pixels of the input; 0 does not smooth.

    Returns
    -------
    (N, H, W) float32. A constant map stays exactly constant; the maps of a batch are bitwise those
    of the single images. NaN propagates over its whole image.

    Raises
    ------
    ValueError  shape, or a sigma that is negative or not finite.

    Notes
    -----
    Bilinear with ``align_corners=False``, then a Gaussian cut at 4 sigma, the border mirrored
    (SciPy's "reflect"). Both are linear and act on each axis alone, so together they are one small
    matrix per axis, whatever the width of the kernel.
    """
    if maps.ndim != 3:
        raise ValueError(f"maps must have shape (N, h, w), got {tuple(maps.shape)}")
    if not 0 <= sigma < float("inf"):
        raise ValueError(f"sigma must be 0 or more pixels, got {sigma}")
    rows, columns = (
        _axis_matrix(n, size, sigma).to(maps)
        for n, size in zip(maps.shape[1:], image_size, strict=True)
    )
    out = maps.new_empty(len(maps), *image_size)
    # One product per image: within a batched product the sums may run in another order.
    for map_, target in zip(maps, out, strict=True):
        base = map_.min()  # what is left of a constant map is exactly zero
        torch.add(rows @ (map_ - base) @ columns.T, base, out=target)
    return out


def resize_map(anomaly_map: Tensor, size: tuple[int, int]) -> Tensor:
    """Bring a map (H, W) to an image's own size (height, width), bilinearly."""
    if anomaly_map.ndim != 2:
        raise ValueError(f"anomaly_map must have shape (H, W), got {tuple(anomaly_map.shape)}")
    return F.interpolate(anomaly_map[None, None], size=size, mode="bilinear", align_corners=False)[
        0, 0
    ]


@lru_cache(maxsize=16)
def _axis_matrix(n: int, size: int, sigma: float) -> Tensor:
    """Upsampling from n to `size` samples followed by smoothing: (size, n) float32."""
    identity = torch.eye(n, dtype=torch.float64)[None]
    upsample = F.interpolate(identity, size=size, mode="linear", align_corners=False)[0].T
    return (_gaussian_matrix(size, sigma) @ upsample).float()


def _gaussian_matrix(size: int, sigma: float) -> Tensor:
    """Smoothing of `size` samples mirrored at both ends: (size, size), every row sums to 1."""
    if sigma == 0:
        return torch.eye(size, dtype=torch.float64)
    radius = int(_TRUNCATE * sigma + 0.5)
    offsets = torch.arange(-radius, radius + 1)
    taps = torch.exp(-0.5 * (offsets.double() / sigma) ** 2)
    source = (torch.arange(size)[:, None] + offsets) % (2 * size)  # mirrored, the period is 2 size
    source = torch.where(source < size, source, 2 * size - 1 - source)
    weights = (taps / taps.sum()).expand(size, -1)
    return torch.zeros(size, size, dtype=torch.float64).scatter_add_(1, source, weights)
