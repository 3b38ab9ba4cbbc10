"""What a network gets where nobody has chosen: two of its levels, and a size of images.

A convolutional network, or a hierarchical transformer, has levels of different reductions. Those
nearest to 8 and 16 are taken, layer2 and layer3 of a ResNet, from images of 256 x 256.

A plain transformer (ViT, DeiT, EVA, DINOv2, DINOv3) has one grid of tokens throughout.

- Levels: the blocks that end half and three quarters of the depth, 6 and 9 of 12. Published detectors
  on such networks read the middle (Dinomaly: blocks 3 to 10 of 12). Early blocks know edges and
  colours, the last ones what the pre-training asked for; and what lies behind the deepest chosen block
  is not computed. The accuracy was not measured.
- Size: the largest that costs no more than the default network at its default size, as more tokens
  show smaller defects. ViT-S/16 gets 384 x 384 and ViT-S/14 336 x 336, both 24 x 24 tokens. It is
  never below 224, the least that such networks are usually trained at, so the larger ones cost more.
  Times: docs/performance.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

__all__ = [
    "REFUSALS",
    "Size",
    "default_layers",
    "default_map_layers",
    "likely_sizes",
    "size_that_works",
]

Size = tuple[int, int]  # (height, width)

REFUSALS: Final = (RuntimeError, AssertionError, ValueError)  # of timm's networks, for a size
_SIDE: Final = 256
_REDUCTIONS: Final = (8, 16)  # of the two levels
_TRANSFORMER_SIDES: Final = (224, 512)  # the least and the most
_MULTIPLY_ADDS: Final = 12e9  # of wide_resnet50_2 up to layer3, for an image of 256 x 256


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


def likely_sizes(
    reductions: Sequence[int] = (), width: int = 0, config: Mapping[str, Any] | None = None
) -> list[Size]:
    """Sizes to try, the first that the network takes is its default.

    Parameters
    ----------
    reductions : of all levels
    width : channels of a level
    config : of timm; the last size is its own, for networks that take no other
    """
    config = config or {}
    side = _SIDE
    # A fixed size means that positions are learned: a convolutional network has none.
    if len(set(reductions)) == 1 and config.get("fixed_input_size"):
        side = _transformer_side(len(reductions), reductions[0], width)
    own = config.get("input_size", (3, side, side))
    return [(side, side), (int(own[1]), int(own[2]))]


def _transformer_side(depth: int, patch: int, width: int) -> int:
    least, most = _TRANSFORMER_SIDES
    sides = range(-(-least // patch) * patch, most + 1, patch)
    used = max(default_layers([patch] * depth)) + 1
    cheap = [s for s in sides if used * _block((s // patch) ** 2, width) <= _MULTIPLY_ADDS]
    return max(cheap, default=sides[0])


def _block(tokens: int, width: int) -> int:
    """Multiply-adds: four projections, attention, and a perceptron of four times the width."""
    return tokens * (12 * width**2 + 2 * tokens * width)


def size_that_works(sizes: Sequence[Size], grid: Callable[[Size], object]) -> Size:
    """The first for which `grid` does not raise; else the first, for the message that it gives."""
    for size in sizes:
        try:
            grid(size)
        except REFUSALS:
            continue
        return size
    return sizes[0]
