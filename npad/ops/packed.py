"""How scatter matrices and factors are stored: packed lower triangles, of floats or of bytes.

Rows stand in panels of 8, each stored column after column; the short panel comes first, below as many
rows of padding as it lacks. Bytes have a scale for every 32 columns of a panel, counted from as many
before the first: 256 numbers, of which the largest becomes 127. The scales of a matrix follow its
bytes. They are float32, since float16 holds neither the largest nor the smallest that networks call
for. ``csrc/packed.h`` has the same definitions, which the tests compare.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

PANEL = 8
BLOCK_COLUMNS = 32  # of a panel, which share a scale
BLOCK = PANEL * BLOCK_COLUMNS
LARGEST_BYTE = 127
ROW_BYTES = 16  # of which a stored matrix of bytes is a multiple: what a GPU loads at once


@lru_cache(maxsize=32)
def packed_layout(channels: int) -> tuple[Tensor, Tensor]:
    """Row and column of every slot of the packed lower triangle; rows of padding are negative."""
    rows, columns = [], []
    for _, width, _ in _panels(channels):
        rows.append(torch.arange(width - PANEL, width, device="cpu").repeat(width))
        columns.append(torch.arange(width, device="cpu").repeat_interleave(PANEL))
    return torch.cat(rows), torch.cat(columns)


def diagonal(channels: int) -> Tensor:
    """Slots of the diagonal."""
    row, column = packed_layout(channels)
    return (row == column).nonzero().flatten()


def padding(channels: int) -> int:
    """Rows of zeros above the first."""
    return -channels % PANEL


def packed_size(channels: int) -> int:
    """Elements of one packed C x C lower triangle."""
    pad = padding(channels)
    panels = (channels + pad) // PANEL
    return PANEL * panels * (PANEL * (panels + 1) // 2 - pad)


def pack(dense: Tensor) -> Tensor:
    """(..., C, C) -> (..., packed): the lower triangle, zeros in the padding."""
    row, column = (index.to(dense.device) for index in packed_layout(dense.shape[-1]))
    lower = dense[..., row.clamp(min=0), column]
    return torch.where(column <= row, lower, torch.zeros_like(lower))


def unpack(packed: Tensor, channels: int) -> Tensor:
    """(..., packed) -> (..., C, C): the lower triangle, zeros above it."""
    row, column = (index.to(packed.device) for index in packed_layout(channels))
    stored = column <= row
    dense = packed.new_zeros(*packed.shape[:-1], channels, channels)
    dense[..., row[stored], column[stored]] = packed[..., stored]
    return dense


def n_scales(channels: int) -> int:
    """Scales of one matrix of bytes."""
    return sum(panel.scales for panel in _panels(channels))


def stored_size(channels: int, dtype: torch.dtype) -> int:
    """Elements of one packed C x C lower triangle as it is stored."""
    if dtype != torch.int8:
        return packed_size(channels)
    size = packed_size(channels) + 4 * n_scales(channels)
    return size + -size % ROW_BYTES


def store(packed: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """(R, packed) float32 -> (R, stored) of ``dtype``, rounded to nearest even.

    A block that is all zero has the scale 0. One that holds NaN or infinity has that as its scale, so
    that what is computed with it is not finite either.
    """
    if dtype != torch.int8:
        return packed.to(dtype)
    stored = packed.new_zeros(len(packed), stored_size(channels, dtype), dtype=dtype)
    scales = []
    for first, columns, blocks in _panels(channels):
        stop, pad = first + PANEL * columns, PANEL * padding(channels)
        filled = F.pad(packed[:, first:stop], (pad, BLOCK * blocks - pad - (stop - first)))
        values = filled.unflatten(1, (blocks, BLOCK))
        scale = values.abs().amax(2) / LARGEST_BYTE
        steps = (values / scale[:, :, None]).nan_to_num_(0, 0, 0).round_()
        stored[:, first:stop] = steps.flatten(1)[:, pad : pad + stop - first]
        scales.append(scale)
    stored[:, _of_scales(channels)] = torch.cat(scales, dim=1).view(torch.int8)
    return stored


def restore(stored: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """(R, stored) -> (R, packed) of a floating ``dtype``."""
    if stored.dtype != torch.int8:
        return stored.to(dtype)
    scale = _scales(stored, channels)[:, _scale_of_slot(channels).to(stored.device)]
    return stored[:, : packed_size(channels)].to(dtype) * scale.to(dtype)


def is_finite(stored: Tensor, channels: int) -> bool:
    """Whether all of what was stored is."""
    values = _scales(stored, channels) if stored.dtype == torch.int8 else stored
    return bool(values.sum(dtype=torch.float32).isfinite())


class _Panel(NamedTuple):
    first_slot: int
    columns: int  # stored; also one past the panel's last row
    scales: int  # of bytes: one for each of its blocks


def _panels(channels: int) -> Iterator[_Panel]:
    first_slot, pad = 0, padding(channels)
    for columns in range(PANEL - pad, channels + 1, PANEL):
        yield _Panel(first_slot, columns, -(-(columns + pad) // BLOCK_COLUMNS))
        first_slot += PANEL * columns


def _of_scales(channels: int) -> slice:
    """The bytes of a matrix that are its scales."""
    first = packed_size(channels)
    return slice(first, first + 4 * n_scales(channels))


def _scales(stored: Tensor, channels: int) -> Tensor:
    """(R, scales) float32; a copy, since a view may start at any byte."""
    rows = stored[:, _of_scales(channels)]
    return rows.clone(memory_format=torch.contiguous_format).view(torch.float32)


@lru_cache(maxsize=32)
def _scale_of_slot(channels: int) -> Tensor:
    """The number of the scale of every slot."""
    pad, found, before = padding(channels), [], 0
    for _, columns, blocks in _panels(channels):
        block = (torch.arange(columns, device="cpu") + pad) // BLOCK_COLUMNS
        found.append((before + block).repeat_interleave(PANEL))
        before += blocks
    return torch.cat(found)
