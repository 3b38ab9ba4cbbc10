"""embed against the library calls that it replaces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from npad import ops

# Channels and side of the levels; the first is the grid.
LEVELS = {
    "resnet18-256": ((128, 32), (256, 16)),  # layers 2 and 3 at 256 pixels
    "wide_resnet50_2-256": ((512, 32), (1024, 16)),
    "filterbank-256": ((17, 64), (17, 32), (17, 16)),
}


class Case(NamedTuple):
    net: str
    batch: int
    layout: str
    dtype: str


CPU = [
    Case(net, batch, layout, "float32")
    for net in LEVELS
    for batch in (1, 16)
    for layout in ("channels-last", "channels-first")
]
CUDA = [
    Case("wide_resnet50_2-256", batch, "channels-last", dtype)
    for batch in (1, 32)
    for dtype in ("float32", "float16")
]


@pytest.mark.cases(cpu=CPU, cuda=CUDA)
@pytest.mark.benchmark(group="embed")
def bench_embed(device: torch.device, case: Case, race: Any, compiled: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    sizes, dtype = LEVELS[case.net], getattr(torch, case.dtype)
    side = sizes[0][1]
    order = torch.channels_last if case.layout == "channels-last" else torch.contiguous_format
    levels = [
        torch.randn(case.batch, c, s, s, device=device, dtype=dtype).to(memory_format=order)
        for c, s in sizes
    ]

    def npad() -> Tensor:
        return ops.embed(levels, (side, side))

    def pytorch() -> Tensor:
        pooled = [F.avg_pool2d(level.float(), 3, stride=1, padding=1) for level in levels]
        aligned = pooled[:1] + [
            F.interpolate(level, size=(side, side), mode="bilinear", align_corners=False)
            for level in pooled[1:]
        ]
        return torch.cat(aligned, dim=1).permute(0, 2, 3, 1).contiguous()

    torch.testing.assert_close(npad(), pytorch(), rtol=1e-5, atol=1e-6)
    n_bytes = sum(level.nbytes for level in levels) + npad().nbytes
    contenders = {"npad": npad, "pytorch": pytorch, **compiled(pytorch)}
    race(contenders, rounds=21, n_bytes=n_bytes)
