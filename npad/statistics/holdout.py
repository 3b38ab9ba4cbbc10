"""Embeddings that are held out from a fit of unknown length."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from npad.learned import Expected

__all__ = ["Reservoir"]

MAX_HELD_OUT = 64  # images whose embeddings are kept in memory while fitting


class Reservoir:
    """Keeps a uniform sample of the embeddings that pass and gives the others back to be fitted.

    An image is a candidate with probability ``fraction`` (the first always is); of the candidates at
    most ``MAX_HELD_OUT`` are kept, by Vitter's algorithm R, so no length need be known.
    """

    def __init__(self, fraction: float, seed: int) -> None:
        self.kept: list[Tensor] = []
        self._fraction = fraction
        self._random = random.Random(seed)
        self._candidates = 0

    def take(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> the embeddings to fit now, (B', H, W, C)."""
        fitted = []
        for embedding in x:
            first = self._candidates == 0 and self._fraction > 0
            if not (self._random.random() < self._fraction or first):
                fitted.append(embedding)
                continue
            self._candidates += 1
            if len(self.kept) < MAX_HELD_OUT:
                self.kept.append(embedding.clone())
                continue
            slot = self._random.randrange(self._candidates)
            if slot < MAX_HELD_OUT:
                fitted.append(self.kept[slot])
                self.kept[slot] = embedding.clone()
            else:
                fitted.append(embedding)
        return torch.stack(fitted) if fitted else x[:0]

    def merge(self, other: Reservoir, fit: Callable[[Tensor], None]) -> None:
        """Take over what another has kept; `fit` gets, as (B, H, W, C), what there is no place for.

        Each place goes to one of the two in proportion to the candidates that it still stands for, so
        that the sample stays uniform.
        """
        kept: list[Tensor] = []
        parts = [list(self.kept), list(other.kept)]
        for part in parts:
            self._random.shuffle(part)
        left = [self._candidates, other._candidates]
        while any(parts) and len(kept) < MAX_HELD_OUT:
            first = self._random.randrange(max(1, sum(left))) < left[0]
            which = 0 if parts[0] and (first or not parts[1]) else 1
            kept.append(parts[which].pop())
            left[which] -= 1
        rest = [*parts[0], *parts[1]]
        if rest:
            fit(torch.stack(rest))
        self.kept = kept
        self._candidates += other._candidates

    def copy(self) -> Reservoir:
        """One that goes on by itself."""
        other = copy.copy(self)
        other.kept, other._random = list(self.kept), copy.copy(self._random)
        return other

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """As JSON types and tensors."""
        values = {
            "candidates": self._candidates,
            "random": self._random.getstate(),
            "kept": len(self.kept),
        }
        return values, {f"kept.{i}": x for i, x in enumerate(self.kept)}

    @staticmethod
    def expected(values: Mapping[str, Any], shape: tuple[int, ...]) -> Expected:
        """Dtype and shape of each tensor of a `state`, by its values and the shape of an embedding."""
        return {f"kept.{i}": (torch.float32, shape) for i in range(int(values["kept"]))}

    def restore(self, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Become what `state` was taken from."""
        version, numbers, gauss = values["random"]
        if any(not 0 <= number < 1 << 32 for number in numbers):
            raise ValueError("the state of the random numbers is none")
        self._random.setstate((version, tuple(numbers), gauss))
        self._candidates = int(values["candidates"])
        self.kept = [tensors[f"kept.{i}"] for i in range(int(values["kept"]))]
