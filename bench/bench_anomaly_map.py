"""The tail of a prediction, anomaly_map and resize_maps, against the library calls they replace."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from npad import ops
from npad.ops import reference

SIGMA, RADIUS = 4.0, 16


class Case(NamedTuple):
    N: int
    grid: int
    side: int


class Resize(NamedTuple):
    N: int
    to: str


@pytest.mark.cases(
    cpu=[Case(1, 32, 256), Case(16, 32, 256), Case(4, 56, 448)],
    cuda=[Case(1, 32, 256), Case(32, 32, 256)],
)
@pytest.mark.benchmark(group="anomaly_map")
def bench_anomaly_map(device: torch.device, case: Case, race: Any) -> None:
    n, grid, side = case
    torch.manual_seed(0)
    m, e = torch.rand(2, n, grid, grid, device=device)
    m, e = 20 + 10 * m, 1 + e
    size = side, side
    taps = torch.exp(-0.5 * (torch.arange(-RADIUS, RADIUS + 1) / SIGMA) ** 2)
    taps = (taps / taps.sum()).to(device)
    smoothing = reference.gaussian_matrix(side, SIGMA)
    identity = torch.eye(grid, dtype=torch.float64)[None]
    upsampling = F.interpolate(identity, size=side, mode="linear", align_corners=False)[0].T
    axis = (smoothing @ upsampling).float().to(device)

    def npad() -> tuple[Tensor, Tensor]:
        return ops.anomaly_map(m, e, True, (0.4, 0.6, 0.0), size, SIGMA)

    def library() -> tuple[Tensor, Tensor]:
        fused = (m**0.4 * e**0.6)[:, None]
        maps = F.interpolate(fused, size=size, mode="bilinear", align_corners=False)
        maps = F.pad(maps, (RADIUS,) * 4, mode="reflect")
        maps = F.conv2d(F.conv2d(maps, taps[None, None, None]), taps[None, None, :, None])[:, 0]
        return maps, maps.amax((1, 2))

    def matrices() -> tuple[Tensor, Tensor]:
        fused = m**0.4 * e**0.6
        maps = fused.new_empty(n, *size)
        for map_, target in zip(fused, maps, strict=True):
            base = map_.min()
            torch.add(axis @ (map_ - base) @ axis.T, base, out=target)
        return maps, maps.amax((1, 2))

    oracle, scores = reference.anomaly_map(
        m.double(), e.double(), True, [0.4, 0.6, 0.0], list(size), SIGMA
    )
    for maps, peaks in (npad(), matrices()):
        torch.testing.assert_close(maps.double(), oracle, rtol=1e-5, atol=0)
        torch.testing.assert_close(peaks.double(), scores, rtol=1e-5, atol=0)
    inside = (..., *2 * (slice(RADIUS, -RADIUS),))  # its border is mirrored about a pixel's centre
    torch.testing.assert_close(library()[0][inside].double(), oracle[inside], rtol=1e-5, atol=0)
    race(
        {"npad": npad, "library": library, "matrices": matrices},
        rounds=301 if n == 1 else 51,
        n_bytes=oracle.numel() * 4,
    )


def sizes_of(case: Resize) -> list[tuple[int, int]]:
    if case.to == "mixed":
        return [(200 + 50 * i, 900 - 40 * i) for i in range(case.N)]
    height, width = case.to.split("x")
    return [(int(height), int(width))] * case.N


@pytest.mark.cases(
    cpu=[
        Resize(16, "1024x1024"),
        Resize(1, "1024x1024"),
        Resize(16, "mixed"),
        Resize(1, "200x333"),
        Resize(16, "64x64"),
    ],
    cuda=[Resize(1, "1024x1024"), Resize(16, "mixed")],
)
@pytest.mark.benchmark(group="resize_maps")
def bench_resize_maps(device: torch.device, case: Resize, race: Any) -> None:
    sizes = sizes_of(case)
    torch.manual_seed(0)
    maps = torch.rand(len(sizes), 256, 256, device=device)

    def npad() -> Tensor:
        return ops.resize_maps(maps, sizes)

    def interpolate() -> list[Tensor]:
        return [
            F.interpolate(map_[None, None], size=size, mode="bilinear", align_corners=False)
            for map_, size in zip(maps, sizes, strict=True)
        ]

    heights, widths = map(list, zip(*sizes, strict=True))
    oracle = reference.resize_maps(maps.double(), heights, widths)
    torch.testing.assert_close(npad().double(), oracle, rtol=0, atol=1e-6)
    others = torch.cat([map_.flatten() for map_ in interpolate()])
    torch.testing.assert_close(others.double(), oracle, rtol=0, atol=1e-3)
    race(
        {"npad": npad, "interpolate": interpolate},
        rounds=15 if len(others) > 2**22 else 101,
        n_bytes=oracle.numel() * 4,
    )
