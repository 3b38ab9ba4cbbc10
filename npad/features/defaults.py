"""What a network gets where nobody has chosen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

__all__ = ["default_layers", "default_map_layers"]

_REDUCTIONS: Final = (8, 16)  # of the two levels chosen by default; layer2 and layer3 of a ResNet


def default_layers(reductions: Sequence[int]) -> tuple[int, ...]:
    """Two levels of a network, from the reductions of all of them."""
    if len(set(reductions)) == 1:
        return tuple(sorted({len(reductions) // 2 - 1, 3 * len(reductions) // 4 - 1}))
    chosen: list[int] = []
    for target in _REDUCTIONS:
        deeper = range(chosen[-1] + 1 if chosen else 0, len(reductions))
        distance = {i: abs(math.log2(reductions[i] / target)) for i in deeper}
        chosen += sorted(distance, key=lambda i: distance[i])[:1]
    return tuple(chosen)


def default_map_layers(
    layers: Sequence[int], reductions: Sequence[int], first: int
) -> tuple[int, ...]:
    """The layers, and the level before them where it is of half their least reduction."""
    before = min(layers) - 1
    finer = before >= first and 2 * reductions[before] == reductions[before + 1]
    return (before, *layers) if finer else tuple(layers)
