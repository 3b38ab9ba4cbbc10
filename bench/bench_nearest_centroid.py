"""nearest_centroid against the plain-PyTorch forms and faiss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from npad import ops


class Case(NamedTuple):
    N: int
    K: int
    C: int


CPU = [Case(1024, 8192, 384), Case(784, 1024, 1536), Case(12544, 2048, 100)]
CUDA = [Case(32 * 1024, 8192, 1536)]


def clustered(n: int, channels: int, device: torch.device) -> Tensor:
    """Spectrum like that of embeddings: half of the variance in a few directions."""
    scale = torch.arange(1, channels + 1, device=device) ** -0.5
    noise = torch.randn(2, n, channels, device=device)
    return noise[0] * scale + 0.1 * noise[1] + 0.5


@pytest.mark.cases(cpu=CPU, cuda=CUDA)
@pytest.mark.benchmark(group="nearest_centroid")
def bench_nearest_centroid(
    device: torch.device, case: Case, race: Any, compiled: Callable[..., Any]
) -> None:
    n, k, channels = case
    torch.manual_seed(0)
    x, centroids = clustered(n, channels, device), clustered(k, channels, device)

    def npad() -> Tensor:
        return ops.nearest_centroid(x, centroids)[0]

    def cdist() -> Tensor:
        return torch.cdist(x, centroids).min(1).values

    def product() -> Tensor:
        least = torch.addmm(centroids.square().sum(1) / 2, x, centroids.T, alpha=-1).min(1).values
        return (x.square().sum(1) + 2 * least).clamp(min=0).sqrt()

    contenders = {"npad": npad, "cdist": cdist, "product": product, **compiled(product)}
    try:
        import faiss
    except ImportError:
        faiss = None
    if faiss and device.type == "cpu":
        faiss.omp_set_num_threads(torch.get_num_threads())
        flat = faiss.IndexFlatL2(channels)
        flat.add(centroids.numpy())

        def faiss_flat() -> Tensor:
            return torch.from_numpy(flat.search(x.numpy(), 1)[0][:, 0]).sqrt()

        contenders["faiss"] = faiss_flat

    oracle = torch.cdist(x[:1024].double(), centroids.double()).min(1).values
    for name, function in contenders.items():
        rtol, atol = (1e-5, 1e-6) if name == "npad" else (1e-3, 1e-3)
        actual = function()[:1024].double()
        torch.testing.assert_close(actual, oracle, rtol=rtol, atol=atol, msg=f"{name} is wrong")
    race(
        contenders,
        rounds=15,
        n_bytes=x.nbytes + centroids.nbytes,
        n_flops=2 * n * k * channels,
        products=("float16", 3),
    )
