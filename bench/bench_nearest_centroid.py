"""nearest_centroid against the plain-PyTorch forms and faiss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from npad import ops

CASES = [(1024, 8192, 384), (784, 1024, 1536), (12544, 2048, 100)]  # embeddings, centroids, C


def clustered(n: int, channels: int) -> Tensor:
    """Spectrum like that of embeddings: half of the variance in a few directions."""
    scale = torch.arange(1, channels + 1) ** -0.5
    return torch.randn(n, channels) * scale + 0.1 * torch.randn(n, channels) + 0.5


@pytest.mark.parametrize("case", CASES, ids=lambda case: "N{}-K{}-C{}".format(*case))
@pytest.mark.benchmark(group="nearest_centroid")
def bench_nearest_centroid(case: tuple[int, int, int], threads: int, race: Any) -> None:
    faiss = pytest.importorskip("faiss")
    faiss.omp_set_num_threads(threads)
    n, k, channels = case
    torch.manual_seed(0)
    x, centroids = clustered(n, channels), clustered(k, channels)
    index = faiss.IndexFlatL2(channels)
    index.add(centroids.numpy())

    def npad() -> Tensor:
        return ops.nearest_centroid(x, centroids)[0]

    def cdist() -> Tensor:
        return torch.cdist(x, centroids).min(1).values

    def product() -> Tensor:
        least = torch.addmm(centroids.square().sum(1) / 2, x, centroids.T, alpha=-1).min(1).values
        return (x.square().sum(1) + 2 * least).clamp(min=0).sqrt()

    def faiss_flat() -> Tensor:
        return torch.from_numpy(index.search(x.numpy(), 1)[0][:, 0]).sqrt()

    oracle = torch.cdist(x.double(), centroids.double()).min(1).values
    torch.testing.assert_close(npad().double(), oracle, rtol=1e-5, atol=1e-6)
    for other in (cdist, product, faiss_flat):
        torch.testing.assert_close(other().double(), oracle, rtol=1e-3, atol=1e-3)
    race(
        {"npad": npad, "cdist": cdist, "product": product, "faiss": faiss_flat},
        rounds=15,
        n_bytes=x.nbytes + centroids.nbytes,
        n_flops=2 * n * k * channels,
    )
