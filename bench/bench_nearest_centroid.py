"""nearest_centroid against cdist, a matrix product with a minimum, and faiss's flat index.

Embeddings and a nominal set of real images where NPAD_DATA and NPAD_WEIGHTS are set. "npad" has the
index of the centroids, which a model builds once.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from npad import ops


class Case(NamedTuple):
    N: int
    K: int
    C: int
    data: str


CPU = [
    Case(1024, 8192, 384, "real"),
    Case(1024, 8192, 384, "clusters"),
    Case(784, 1024, 1536, "clusters"),
    Case(12544, 2048, 100, "clusters"),
    Case(1024, 8192, 384, "noise"),  # the worst case of an index
]
CUDA = [Case(32 * 1024, 8192, 1536, "clusters")]
IMAGES = 100  # of the nominal set


@cache
def real() -> tuple[Tensor, Tensor]:
    """Embeddings of one defective image and centroids of good ones."""
    data, weights = os.environ.get("NPAD_DATA"), os.environ.get("NPAD_WEIGHTS")
    if not data or not weights:
        pytest.skip("NPAD_DATA and NPAD_WEIGHTS are not set")
    from npad.features.backbone import Backbone
    from npad.images.source import ImageSource

    backbone = Backbone("resnet18", (2, 3), Path(weights) / "resnet18_layers123.safetensors")

    def embed(folder: Path, n: int) -> Tensor:
        source = ImageSource(sorted(folder.iterdir())[:n], image_size=(256, 256))
        with torch.inference_mode():
            return torch.cat([backbone(batch.images).flatten(0, 2) for batch in source.batches()])

    mtd = Path(data) / "mtd"
    points = embed(mtd / "train" / "good", IMAGES)
    return embed(mtd / "test" / "crack", 1), points[ops.farthest_first(points, 8192)[0]]


def clusters(n: int, k: int, channels: int) -> tuple[Tensor, Tensor]:
    """Many clusters of very different size; half of the variance in fifteen directions."""
    scale = torch.arange(1, channels + 1) ** -0.6
    centres = torch.randn(2000, channels) * scale
    cluster = (2000 * torch.rand(n + k) ** 3).long()
    points = centres[cluster] + 0.5 * torch.randn(n + k, channels) * scale + 0.5
    return points[:n], points[n:]


def arguments(case: Case) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    n, k, channels, data = case
    if data == "real":
        return real()
    if data == "noise":
        return torch.randn(n, channels), torch.randn(k, channels)
    return clusters(n, k, channels)


@pytest.mark.cases(cpu=CPU, cuda=CUDA)
@pytest.mark.benchmark(group="nearest_centroid")
def bench_nearest_centroid(
    device: torch.device, case: Case, race: Any, compiled: Callable[..., Any]
) -> None:
    x, centroids = (a.to(device) for a in arguments(case))
    index = ops.centroid_index(centroids)

    def npad() -> Tensor:
        return ops.nearest_centroid(x, centroids, index)[0]

    def without_index() -> Tensor:
        return ops.nearest_centroid(x, centroids)[0]

    def build() -> Tensor:
        return ops.centroid_index(centroids)

    def cdist() -> Tensor:
        return torch.cdist(x, centroids).min(1).values

    def product() -> Tensor:
        least = torch.addmm(centroids.square().sum(1) / 2, x, centroids.T, alpha=-1).min(1).values
        return (x.square().sum(1) + 2 * least).clamp(min=0).sqrt()

    exact = {"npad": npad, "without index": without_index}
    others = {"cdist": cdist, "product": product, **compiled(product)}
    if device.type == "cpu":
        try:
            import faiss
        except ImportError:
            pass
        else:
            faiss.omp_set_num_threads(torch.get_num_threads())
            flat = faiss.IndexFlatL2(x.shape[1])
            flat.add(centroids.numpy())
            others["faiss"] = lambda: torch.from_numpy(flat.search(x.numpy(), 1)[0][:, 0]).sqrt()

    oracle = torch.cdist(x[:1024].double(), centroids.double()).min(1).values
    for function in exact.values():
        torch.testing.assert_close(function()[:1024].double(), oracle, rtol=1e-5, atol=1e-6)
    assert torch.equal(npad(), without_index())
    for other in others.values():
        torch.testing.assert_close(other()[:1024].double(), oracle, rtol=1e-3, atol=1e-3)
    race(
        {**exact, "building the index": build, **others},
        rounds=15,
        n_bytes=x.nbytes + centroids.nbytes,
        n_flops=2 * len(x) * centroids.numel(),
        products=("float16", 1),
    )
