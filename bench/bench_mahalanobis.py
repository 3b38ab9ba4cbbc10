"""mahalanobis against anomalib's expression and the best plain-PyTorch forms."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from npad import ops
from npad.ops import reference
from npad.ops.packed import packed_layout, restore, store


class Case(NamedTuple):
    P: int
    C: int
    batch: int
    factor: str


def cases(sizes: list[tuple[int, int]], batches: list[int]) -> list[Case]:
    factors = ["float32", "float16", "int8"]
    return [Case(*size, batch, factor) for size in sizes for batch in batches for factor in factors]


CPU = cases([(1024, 384), (3136, 550)], [1, 16])
CUDA = cases([(1024, 384), (1024, 1536)], [1]) + cases([(3136, 550)], [1, 32])


@lru_cache(maxsize=1)
def gaussians(
    positions: int, channels: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Means, packed float32 factors, dense factors W and precisions W^T W."""
    torch.manual_seed(0)
    packed = torch.randn(positions, ops.packed_size(channels), device=device).div_(channels**0.5)
    row, column = (index.to(device) for index in packed_layout(channels))
    packed.mul_(column <= row)
    dense = torch.cat([reference.unpack(part, channels) for part in packed.split(64)])
    mean = torch.randn(positions, channels, device=device)
    return mean, packed, dense, dense.mT @ dense


@pytest.mark.cases(cpu=CPU, cuda=CUDA)
@pytest.mark.benchmark(group="mahalanobis")
def bench_mahalanobis(
    device: torch.device, case: Case, race: Any, compiled: Callable[..., Any]
) -> None:
    positions, channels, batch, dtype = case
    mean, packed, dense, precision = gaussians(positions, channels, device)
    side = int(positions**0.5)
    grid = (side, side)
    factor = store(packed, channels, getattr(torch, dtype))
    x = torch.randn(batch, side, side, channels, device=device)
    channels_first = x.permute(0, 3, 1, 2).contiguous()  # as each library holds its embeddings

    def npad(window: int = 1) -> Tensor:
        return ops.mahalanobis(x, mean, factor, grid, window)

    def anomalib() -> Tensor:
        embedding = channels_first.reshape(batch, channels, positions)
        delta = (embedding - mean.T).permute(2, 0, 1)
        squared = (torch.matmul(delta, precision) * delta).sum(2).permute(1, 0)
        return squared.reshape(batch, side, side).clamp(0).sqrt()

    def pytorch() -> Tensor:
        z = (x.reshape(batch, positions, channels) - mean).permute(1, 2, 0)
        return torch.linalg.vector_norm(torch.bmm(dense, z), dim=1).T.reshape(batch, side, side)

    contenders: dict[str, Callable[[], Tensor]] = {
        "npad": npad,
        "anomalib": anomalib,
        "pytorch": pytorch,
    }
    if device.type == "cuda":
        stored = dense.to(torch.float16 if dtype == "int8" else factor.dtype)

        def in_storage_type() -> Tensor:
            z = (x.reshape(batch, positions, channels) - mean).permute(1, 2, 0).to(stored.dtype)
            product = torch.bmm(stored, z).float()
            return torch.linalg.vector_norm(product, dim=1).T.reshape(batch, side, side)

        def by_rows() -> Tensor:
            """What a compiler can make one pass over the factor of."""
            z = x.reshape(positions, 1, channels) - mean[:, None]
            return (stored.float() * z).sum(2).square().sum(1).sqrt().reshape(1, side, side)

        if dtype == "float16":
            contenders["pytorch float16"] = in_storage_type
        contenders |= compiled(by_rows if batch == 1 else in_storage_type)

    q = torch.arange(0, positions, positions // 16, device=device)
    z = (x.flatten(1, 2)[:, q] - mean[q]).double()
    w = reference.unpack(restore(factor[q], channels, torch.float64), channels)
    expected = torch.einsum("qij,nqj->nqi", w, z).norm(dim=2)
    for name, function in contenders.items():
        rtol = 1e-4 if name == "npad" else 3e-3
        actual = function().flatten(1)[:, q].double()
        if name != "npad" and dtype == "int8":
            rtol = 3e-2  # of factors that were not rounded to bytes
        torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol, msg=f"{name} is wrong")
    if batch == 1:
        contenders["npad window 3"] = lambda: npad(3)
        assert (npad(3) <= npad()).all()
    race(
        contenders,
        rounds=15 if batch == 1 else 5,
        n_bytes=factor.nbytes + x.nbytes + mean.nbytes,
        n_flops=batch * positions * channels * (channels + 1),
        products=("tf32", 3) if dtype == "float32" else ("float16", 2),
    )
