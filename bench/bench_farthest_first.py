"""farthest_first against anomalib's coreset loop and the reference, per centre.

The loops cost the same for every centre, so that a few give their rate; farthest_first is timed over
all, as its cost differs from centre to centre.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from npad import ops, reference

FEW = 20  # centres of a loop that is timed
DIM = 334  # of anomalib's projection at this number of embeddings


def real_embeddings(data: Path, weights: Path) -> Tensor:
    from npad.backbone import Backbone
    from npad.images import ImageSource

    backbone = Backbone("resnet18", (2, 3), weights / "resnet18_layers123.safetensors")
    source = ImageSource(data / "mtd" / "train" / "good", image_size=(256, 256))
    with torch.inference_mode():
        return torch.cat([backbone(batch.images).flatten(0, 2) for batch in source.batches()])


def synthetic_embeddings(n: int = 780_288, channels: int = 384) -> Tensor:
    """Many clusters of very different size; half of the variance in fifteen directions."""
    scale = torch.arange(1, channels + 1) ** -0.6
    centres = torch.randn(2000, channels) * scale
    cluster = (2000 * torch.rand(n) ** 3).long()
    return centres[cluster] + 0.5 * torch.randn(n, channels) * scale


@pytest.fixture(scope="module")
def points() -> Tensor:
    torch.manual_seed(0)
    data, weights = os.environ.get("NPAD_DATA"), os.environ.get("NPAD_WEIGHTS")
    x = real_embeddings(Path(data), Path(weights)) if data and weights else synthetic_embeddings()
    return x @ torch.randn(x.shape[1], DIM).div_(DIM**0.5)


def anomalib_loop(points: Tensor, n_centroids: int) -> Tensor:
    sampling = pytest.importorskip("anomalib.models.components.sampling.k_center_greedy")
    loop = sampling.KCenterGreedy(points, sampling_ratio=2 / len(points))
    loop.features = points  # what its own projection would return
    loop.reset_distances()
    index = torch.tensor(0)
    chosen = [index]
    for _ in range(n_centroids - 1):
        loop.update_distances(index)
        index = loop.get_new_idx()
        loop.min_distances[index] = 0
        chosen.append(index)
    return torch.stack(chosen)


@pytest.mark.parametrize("n_centroids", [1000, 7802])
@pytest.mark.benchmark(group="farthest_first")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def bench_farthest_first(
    points: Tensor,
    n_centroids: int,
    threads: int,
    benchmark: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    expected = anomalib_loop(points, FEW)
    index, _ = ops.farthest_first(points, FEW)
    assert torch.equal(index, expected)

    def per_centre(function: Callable[[Tensor, int], object], centres: int) -> float:
        start = time.perf_counter()
        function(points, centres)
        return (time.perf_counter() - start) / centres

    before = {
        "anomalib": per_centre(anomalib_loop, FEW),
        "pytorch": per_centre(reference.farthest_first, FEW),
    }
    benchmark.pedantic(ops.farthest_first, (points, n_centroids), rounds=1)
    own = benchmark.stats.stats.min / n_centroids
    after = per_centre(anomalib_loop, FEW)  # the machine may have changed its pace
    others = {**before, "anomalib": min(before["anomalib"], after)}
    ratios = {name: seconds / own for name, seconds in others.items()}
    benchmark.extra_info.update(
        threads=threads,
        points=list(points.shape),
        per_centre_s={"npad": own, **others},
        ratios=ratios,
    )
    with capsys.disabled():
        text = ", ".join(f"{name} {ratio:.0f}x" for name, ratio in ratios.items())
        print(
            f"\nfarthest_first {n_centroids}, {threads} threads: {own * 1e3:.2f} ms/centre; {text}"
        )
