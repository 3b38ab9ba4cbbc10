"""Axes to which embeddings are reduced."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from npad import ops

__all__ = ["principal_axes"]


def principal_axes(embeddings: Iterable[Tensor], n: int) -> Tensor:
    """Axes along which embeddings vary most, the first the most.

    Parameters
    ----------
    embeddings : batches (..., C) float32, one at least; one is in memory at a time
    n : number of axes, at most C

    Returns
    -------
    (C, n) float32, orthonormal columns
    """
    moments: tuple[Tensor, Tensor, Tensor] | None = None
    for x in embeddings:
        channels = x.shape[-1]
        if moments is None:
            count = torch.zeros(1, dtype=torch.int64, device=x.device)
            scatter = x.new_zeros(1, ops.packed_size(channels))
            moments = count, x.new_zeros(1, channels), scatter
        ops.neighborhood_moments(x.reshape(-1, 1, 1, channels), *moments)
    if moments is None:
        raise ValueError("principal_axes: no embeddings")
    _, covariance = ops.window_covariance(*moments, (1, 1), 1, 0, 1)
    _, vectors = torch.linalg.eigh(covariance[0].double())
    return vectors[:, -n:].flip(1).float().contiguous()
