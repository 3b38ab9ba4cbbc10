"""From distances on the grid to anomaly maps: how they are fused, smoothed and resized."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from itertools import accumulate
from operator import mul

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from torch import Tensor

from npad import ops
from npad.learned import Standardization
from npad.members import Member
from npad.settings import FUSIONS, Settings, uses_gaussians, uses_nominal_set

# Distances of a member, and of all of them: OF_SCORE and OF_MAP are Mahalanobis distances.
MAHALANOBIS, PREFIX, EUCLIDEAN = "mahalanobis", "mahalanobis_prefix", "euclidean"
OF_SCORE, OF_MAP = "mahalanobis_score", "mahalanobis_map"


def fusion_arguments(
    mahalanobis: Tensor | None,
    euclidean: Tensor | None,
    fusion: str,
    weight: float = 0.4,
    moments: Sequence[Standardization] = (),
) -> tuple[Tensor | None, Tensor | None, bool, tuple[float, float, float]]:
    """The first four arguments of ``ops.anomaly_map`` that fuse the maps M and E in a given way.

    Parameters
    ----------
    mahalanobis, euclidean : (N, h, w) distances, on grids of any size; None for one that the fusion
        does not use.
    fusion : "product" (M^weight E^(1-weight)), "sum" (weight times M plus 1 - weight times E, both
        standardised), "mahalanobis" or "euclidean" (that map alone).
    weight : share of M in "product" and "sum", from 0 to 1.
    moments : of M and of E on nominal images; needed by "sum".

    Raises
    ------
    ValueError
        Unknown fusion, weight outside [0, 1], a missing map or moments, a standard deviation that is
        not above 0.
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
    assert mahalanobis is not None
    assert euclidean is not None
    m, e = _on_one_grid([mahalanobis, euclidean])
    if fusion == "product":
        return m, e, True, (weight, 1 - weight, 0.0)
    if not moments:
        raise ValueError("fusion 'sum' needs standardization, measured on held-out nominal images")
    of_m, of_e = moments
    if not (of_m.std > 0 and of_e.std > 0):
        raise ValueError(
            f"fusion 'sum' needs standard deviations above 0, got {of_m.std} and {of_e.std}"
        )
    a, b = weight / of_m.std, (1 - weight) / of_e.std
    return m, e, False, (a, b, -a * of_m.mean - b * of_e.mean)


def joined(found: Sequence[tuple[Member, Mapping[str, Tensor]]]) -> dict[str, Tensor]:
    """The distances of all members as one map of each kind, on the finest grid of the kind.

    Several of a kind come to their geometric mean: all count alike, and no unit of one can tilt it.

    Parameters
    ----------
    found : each member and its distances (N, h, w), by the names MAHALANOBIS, PREFIX and EUCLIDEAN

    Returns
    -------
    dict with the keys OF_SCORE and OF_MAP (Mahalanobis distances) and EUCLIDEAN, as far as there are
    such; the first two are one tensor where they are the same distances
    """
    gaussians = [(member, d) for member, d in found if MAHALANOBIS in d]
    kinds = {
        OF_SCORE: [d.get(PREFIX, d[MAHALANOBIS]) for m, d in gaussians if m.in_score],
        OF_MAP: [d[MAHALANOBIS] for m, d in gaussians if m.in_map],
        EUCLIDEAN: [d[EUCLIDEAN] for _, d in found if EUCLIDEAN in d],
    }
    means: dict[tuple[int, ...], Tensor] = {}  # of the same distances, one
    for maps in kinds.values():
        if maps and _ids(maps) not in means:
            means[_ids(maps)] = _geometric_mean(maps)
    return {kind: means[_ids(maps)] for kind, maps in kinds.items() if maps}


def _ids(maps: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(map(id, maps))


def scores_and_maps(
    found: Sequence[tuple[Member, Mapping[str, Tensor]]],
    settings: Settings,
    standardization: Mapping[str, Standardization] | None = None,
    extent: tuple[int, int] | None = None,
    inside: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What the distances of all members come to.

    Parameters
    ----------
    found : as for `joined`
    settings : image size, fusion, weights and smoothing
    standardization : of what `joined` gives; needed by the fusion "sum"
    extent : pixels (height, width) that the grids cover, at least the image; None: the image
    inside : (B or 1, H, W) bool, where maps and scores look; None: everywhere

    Returns
    -------
    scores (B,), the maximum of the map inside, and maps (B, H, W), NaN outside
    """
    maps = joined(found)
    size, sigma = settings.size, settings.sigma

    def fused(kind: str, weight: float) -> tuple[Tensor, Tensor]:
        moments = [standardization[k] for k in (kind, EUCLIDEAN)] if standardization else ()
        pair = maps.get(kind), maps.get(EUCLIDEAN)
        terms = fusion_arguments(*pair, settings.fusion, weight, moments)
        smooth, scores = ops.anomaly_map(*terms, extent or size, sigma)
        if smooth.shape[1:] != size:
            smooth = smooth[:, : size[0], : size[1]]
            scores = smooth.amax((1, 2))
        if inside is None:
            return smooth, scores
        scores = torch.where(inside, smooth, -torch.inf).amax((1, 2))
        return torch.where(inside, smooth, torch.nan), scores

    smooth, scores = fused(OF_MAP, settings.map_weight)
    weighed = uses_gaussians(settings.fusion) and uses_nominal_set(settings.fusion)
    same_weight = not weighed or settings.map_weight == settings.fusion_weight
    if not same_weight or maps.get(OF_SCORE) is not maps.get(OF_MAP):
        _, scores = fused(OF_SCORE, settings.fusion_weight)
    return scores, smooth


def _on_one_grid(maps: Sequence[Tensor]) -> list[Tensor]:
    """Maps (N, h, w), all on the finest of their grids, bilinearly."""
    finest = max(x.shape[1:] for x in maps)
    return [
        x
        if x.shape[1:] == finest
        else F.interpolate(x[:, None], size=finest, mode="bilinear", align_corners=False)[:, 0]
        for x in maps
    ]


def _geometric_mean(maps: Sequence[Tensor]) -> Tensor:
    if len(maps) == 1:
        return maps[0]
    return reduce(mul, (x ** (1 / len(maps)) for x in _on_one_grid(maps)))


def resized(maps: Tensor, sizes: Sequence[tuple[int, int]]) -> list[NDArray[np.float32]]:
    """Maps (N, H, W) float32, each at its own size (height, width), bilinearly; see `cut`."""
    return cut(ops.resize_maps(maps, sizes).cpu(), sizes)


def with_shares(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Maps that are NaN outside a region, as two that can be resized: see `inside_alone`."""
    outside = maps.isnan()
    return maps.masked_fill(outside, 0), (~outside).float()


def inside_alone(values: Tensor, shares: Tensor) -> Tensor:
    """What `with_shares` gave, resized -> maps that are NaN outside of the region, resized.

    A value is the mean of those inside among its neighbours, by their weights; a pixel is inside where
    these are half of all weights, or more.
    """
    return torch.where(shares >= 0.5, values / shares, torch.nan)


def cut(flat: Tensor, sizes: Sequence[tuple[int, int]]) -> list[NDArray[np.float32]]:
    """The maps that ``ops.resize_maps`` has put one after another.

    They are views of one array, which holds them all for as long as one of them is in use.
    """
    ends = list(accumulate(height * width for height, width in sizes))
    parts = np.split(flat.numpy(), ends[:-1]) if ends else []
    return [part.reshape(size) for part, size in zip(parts, sizes, strict=True)]
