"""pack_factor against a gather, which is what plain PyTorch has for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from npad import ops
from npad.ops import reference
from npad.ops.packed import packed_layout


class Case(NamedTuple):
    R: int
    C: int
    dtype: str


SIZES = [(112, 384), (56, 550), (8, 1536)]  # a chunk of NeighborhoodGaussian.finalize is 16 MB


@pytest.mark.cases(
    cpu=[Case(*size, dtype) for size in SIZES for dtype in ("float32", "float16")],
    cuda=[Case(16 * r, c, dtype) for r, c in SIZES for dtype in ("float32", "float16")],
)
@pytest.mark.benchmark(group="pack_factor")
def bench_pack_factor(
    device: torch.device, case: Case, race: Any, compiled: Callable[..., Any]
) -> None:
    count, channels, name = case
    dtype = getattr(torch, name)
    torch.manual_seed(0)
    dense = torch.randn(count, channels, channels, device=device)
    row, column = (index.to(device) for index in packed_layout(channels))
    slot, stored = (row.clamp(min=0) * channels + column), column <= row

    def npad() -> Tensor:
        return ops.pack_factor(dense, dtype)

    def gather() -> Tensor:
        return (dense.flatten(1)[:, slot] * stored).to(dtype)

    contenders = {"npad": npad, "gather": gather, **compiled(gather)}
    expected = reference.pack_factor(dense, dtype)
    for function in contenders.values():
        assert torch.equal(function(), expected)
    elements = count * channels * (channels + 1) // 2
    race(contenders, rounds=15, n_bytes=4 * elements + expected.nbytes)
