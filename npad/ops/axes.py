"""Orthonormal axes: random ones, and about the leading ones of some rows."""

from __future__ import annotations

import torch
from torch import Tensor

SAMPLE = 4096  # rows, at most, that choose axes
ITERATIONS = 2
LARGEST = 1e14  # deviations whose squares, summed, stay far from overflow


def random_axes(
    channels: int, n: int, generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Axes of a random space: (channels, n) of ``dtype``, orthonormal columns.

    Drawn on the generator's device: that of a CPU gives the same for every device.
    """
    gaussian = torch.randn(channels, n, generator=generator, dtype=dtype, device=generator.device)
    return torch.linalg.qr(gaussian).Q


def fixed_axes(channels: int, n: int) -> Tensor:
    """(channels, n) float64 random axes, the same on every call."""
    return random_axes(channels, n, torch.Generator().manual_seed(0), torch.float64)


def leading_axes(rows: Tensor, n_axes: int) -> tuple[Tensor, Tensor] | None:
    """Mean (C,) of a sample of the rows (N, C), and about its leading principal axes, leading first.

    Axes are orthonormal columns, (C, min(n_axes, C)) float64 on the CPU, however coarse the matrix
    products of the device are. None where squares of deviations from the mean could overflow.

    Power iteration from random directions (Halko, Martinsson, Tropp, *Finding structure with
    randomness*, 2011); the last product's singular vectors put them in order.
    """
    channels = rows.shape[1]
    sample = rows
    if len(rows) > SAMPLE:  # one of each stretch: steps could keep to one column of a grid
        generator = torch.Generator().manual_seed(0)
        place = torch.rand(SAMPLE, generator=generator, dtype=torch.float64, device="cpu")
        place += torch.arange(SAMPLE, device="cpu")
        sample = rows[(place * (len(rows) / SAMPLE)).long().to(rows.device)]
    mean = sample.mean(0)
    deviation = sample - mean
    if not bool(deviation.abs().max() < LARGEST):
        return None
    axes = fixed_axes(channels, min(n_axes, channels))
    for _ in range(ITERATIONS):
        product = deviation.T @ (deviation @ axes.to(deviation))
        axes, triangle = torch.linalg.qr(product.cpu().double())
    return mean, axes @ torch.linalg.svd(triangle).U


def as_rows(axes: Tensor, n_rows: int, like: Tensor, first: int = 0) -> Tensor:
    """The columns (C, n) as rows of a (n_rows, C) tensor as kernels take it, from row ``first`` on.

    All other rows are zero. Its dtype and device are those of ``like``.
    """
    rows = like.new_zeros(n_rows, len(axes))
    rows[first : first + axes.shape[1]] = axes.T
    return rows
