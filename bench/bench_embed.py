"""embed against the library calls that it replaces."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from npad import ops

# Channels and side of the levels; the first is the grid.
CASES = {
    "resnet18-256": ((128, 32), (256, 16)),  # layers 2 and 3 at 256 pixels
    "wide_resnet50_2-224": ((512, 28), (1024, 14)),
    "filterbank-256": ((17, 64), (17, 32), (17, 16)),
}


@pytest.mark.parametrize("layout", ["channels-last", "channels-first"])
@pytest.mark.parametrize("batch", [1, 16], ids=lambda n: f"B{n}")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.benchmark(group="embed")
def bench_embed(case: str, batch: int, layout: str, threads: int, race: Any) -> None:
    torch.manual_seed(0)
    side = CASES[case][0][1]
    order = torch.channels_last if layout == "channels-last" else torch.contiguous_format
    levels = [torch.randn(batch, c, s, s).to(memory_format=order) for c, s in CASES[case]]

    def npad() -> Tensor:
        return ops.embed(levels, (side, side))

    def pytorch() -> Tensor:
        pooled = [F.avg_pool2d(level, 3, stride=1, padding=1) for level in levels]
        aligned = pooled[:1] + [
            F.interpolate(level, size=(side, side), mode="bilinear", align_corners=False)
            for level in pooled[1:]
        ]
        return torch.cat(aligned, dim=1).permute(0, 2, 3, 1).contiguous()

    torch.testing.assert_close(npad(), pytorch(), rtol=1e-5, atol=1e-6)
    n_bytes = sum(level.nbytes for level in levels) + npad().nbytes
    race({"npad": npad, "pytorch": pytorch}, rounds=21, n_bytes=n_bytes)
