"""Axes to which embeddings are reduced."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from npad import ops

__all__ = ["PrincipalAxes", "leading_axes", "principal_axes"]

STEP = 8  # numbers of axes are multiples of it, as the rows of a packed factor come


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
    found = PrincipalAxes()
    for x in embeddings:
        found.update(x)
    return found.leading(n)


class PrincipalAxes:
    """Axes along which embeddings vary most, which come in batches: only their moments are kept."""

    def __init__(self) -> None:
        self._moments: tuple[Tensor, Tensor, Tensor] | None = None

    def update(self, x: Tensor) -> None:
        """Add embeddings (..., C) float32."""
        channels = x.shape[-1]
        if self._moments is None:
            count = torch.zeros(1, dtype=torch.int64, device=x.device)
            scatter = x.new_zeros(1, ops.packed_size(channels))
            self._moments = count, x.new_zeros(1, channels), scatter
        ops.neighborhood_moments(x.reshape(-1, 1, 1, channels), *self._moments)

    def leading(self, n: int) -> Tensor:
        """(C, n) float32, orthonormal columns, the first of which varies most."""
        if self._moments is None:
            raise ValueError("principal_axes: no embeddings")
        _, covariance = ops.window_covariance(*self._moments, (1, 1), 1, 0, 1)
        _, vectors = _decomposed(covariance[0].double())
        return vectors[:, :n].float().contiguous()


def leading_axes(covariance: Tensor, share: float, most: int) -> Tensor | None:
    """As many principal axes as hold a share of the variance.

    Parameters
    ----------
    covariance : (C, C) float64
    share : of the sum of the variances, 0 to 1
    most : number of axes, if that is fewer

    Returns
    -------
    (C, n) float32, orthonormal columns, n a multiple of 8 but for ``most``; None where that would
    leave out fewer than 8
    """
    variances, vectors = _decomposed(covariance)
    held = variances.clamp(min=0).cumsum(0)
    enough = int((held < share * held[-1]).sum()) + 1
    n = min(-(-enough // STEP) * STEP, most)
    return vectors[:, :n].float().contiguous() if n <= len(covariance) - STEP else None


def _decomposed(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, the largest first, and eigenvectors as columns."""
    values, vectors = torch.linalg.eigh(covariance)
    return values.flip(0), vectors.flip(1)
