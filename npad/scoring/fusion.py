"""From distances on the grid to anomaly maps: how they are fused, smoothed and resized."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import accumulate
from operator import add, mul

import numpy as np
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from torch import Tensor

from npad import ops
from npad.learned import Standardization
from npad.members import Member
from npad.settings import FUSIONS, Settings, uses_gaussians, uses_nominal_set

MAHALANOBIS, PREFIX, EUCLIDEAN = "mahalanobis", "mahalanobis_prefix", "euclidean"


@dataclass(frozen=True, eq=False)
class Distance:
    """Distances (N, h, w) of one kind, and what they are on nominal images, for the fusion "sum"."""

    map: Tensor
    standardization: Standardization | None = None


def fusion_arguments(
    mahalanobis: Sequence[Distance],
    euclidean: Sequence[Distance],
    fusion: str,
    weight: float = 0.4,
) -> tuple[Tensor | None, Tensor | None, bool, tuple[float, float, float]]:
    """The first four arguments of ``ops.anomaly_map`` that fuse distances in a given way.

    Several of a kind count alike, and together as much as one would: in "sum" by their mean once
    standardised, else by their geometric mean, which no unit of theirs can tilt.

    Parameters
    ----------
    mahalanobis, euclidean : those of a kind that the fusion does not use may be absent
    fusion : "product" (M^weight E^(1-weight)), "sum" (weight times M plus 1 - weight times E, both
        standardised), "mahalanobis" or "euclidean" (that kind alone).
    weight : share of M in "product" and "sum", from 0 to 1.

    Raises
    ------
    ValueError
        Unknown fusion, weight outside [0, 1], missing distances or standardization, a standard
        deviation that is not above 0.
    """
    if fusion not in FUSIONS:
        raise ValueError(f"fusion must be one of {', '.join(FUSIONS)}, got {fusion!r}")
    if not 0 <= weight <= 1:
        raise ValueError(f"weight must be between 0 and 1, got {weight}")
    if uses_gaussians(fusion) and not mahalanobis:
        raise ValueError(f"fusion {fusion!r} needs Mahalanobis distances")
    if uses_nominal_set(fusion) and not euclidean:
        raise ValueError(f"fusion {fusion!r} needs Euclidean distances, which need a nominal set")
    if fusion == "mahalanobis":
        return _geometric_mean(mahalanobis), None, False, (1.0, 0.0, 0.0)
    if fusion == "euclidean":
        return None, _geometric_mean(euclidean), False, (0.0, 1.0, 0.0)
    if fusion == "product":
        m, e = _on_one_grid([_geometric_mean(mahalanobis), _geometric_mean(euclidean)])
        return m, e, True, (weight, 1 - weight, 0.0)
    (m, a, c), (e, b, d) = (_standardized(distances) for distances in (mahalanobis, euclidean))
    m, e = _on_one_grid([m, e])
    return m, e, False, (weight * a, (1 - weight) * b, weight * c + (1 - weight) * d)


def scores_and_maps(
    found: Sequence[tuple[Member, Mapping[str, Distance]]], settings: Settings
) -> tuple[Tensor, Tensor]:
    """What the distances of all members come to.

    Parameters
    ----------
    found : each member and its distances, by the names `MAHALANOBIS`, `PREFIX` and `EUCLIDEAN`
    settings : image size, fusion and weights

    Returns
    -------
    scores (B,) and maps (B, H, W)
    """
    euclidean = [d[EUCLIDEAN] for _, d in found if EUCLIDEAN in d]
    gaussians = [(member, d) for member, d in found if MAHALANOBIS in d]
    of_score = [d.get(PREFIX, d[MAHALANOBIS]) for member, d in gaussians if member.in_score]
    of_map = [d[MAHALANOBIS] for member, d in gaussians if member.in_map]
    size, sigma = settings.size, smoothing_sigma(settings.size)

    def fused(mahalanobis: Sequence[Distance], weight: float) -> tuple[Tensor, Tensor]:
        terms = fusion_arguments(mahalanobis, euclidean, settings.fusion, weight)
        return ops.anomaly_map(*terms, size, sigma)

    maps, scores = fused(of_map, settings.map_weight)
    weighed = bool(euclidean and gaussians)
    if of_score != of_map or (weighed and settings.map_weight != settings.fusion_weight):
        _, scores = fused(of_score, settings.fusion_weight)
    return scores, maps


def _on_one_grid(maps: Sequence[Tensor]) -> list[Tensor]:
    """Maps (N, h, w), all on the finest of their grids, bilinearly."""
    finest = max(x.shape[1:] for x in maps)
    return [
        x
        if x.shape[1:] == finest
        else F.interpolate(x[:, None], size=finest, mode="bilinear", align_corners=False)[:, 0]
        for x in maps
    ]


def _geometric_mean(distances: Sequence[Distance]) -> Tensor:
    maps = _on_one_grid([distance.map for distance in distances])
    if len(maps) == 1:
        return maps[0]
    return reduce(mul, (x ** (1 / len(maps)) for x in maps))


def _standardized(distances: Sequence[Distance]) -> tuple[Tensor, float, float]:
    """A map, and a factor and a summand that make of it the mean of the standardised distances."""
    moments = [distance.standardization for distance in distances]
    if not all(moments):
        raise ValueError("fusion 'sum' needs standardization, measured on held-out nominal images")
    known = [m for m in moments if m is not None]
    if not all(m.std > 0 for m in known):
        deviations = ", ".join(str(m.std) for m in known)
        raise ValueError(f"fusion 'sum' needs standard deviations above 0, got {deviations}")
    maps = _on_one_grid([distance.map for distance in distances])
    if len(maps) == 1:
        return maps[0], 1 / known[0].std, -known[0].mean / known[0].std
    total = reduce(add, ((x - m.mean) / m.std for x, m in zip(maps, known, strict=True)))
    return total, 1 / len(maps), 0.0


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
