"""Embeddings that are held out from a fit of unknown length."""

from __future__ import annotations

import random

import torch
from torch import Tensor

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
