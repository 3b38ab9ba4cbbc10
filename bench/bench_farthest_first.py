"""farthest_first against anomalib's coreset loop and the reference, per centre.

The loops cost the same for every centre, so that a few give their rate; farthest_first is timed over
all, as its cost differs from centre to centre.
"""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from npad import ops
from npad.ops import reference

FEW = 20  # centres of a loop that is timed


class Case(NamedTuple):
    D: int  # dimensions; anomalib's projection has 334 at this number of embeddings
    centres: int


@lru_cache
def embeddings() -> Tensor:
    """Real ones, where NPAD_DATA and NPAD_WEIGHTS say where to find them."""
    torch.manual_seed(0)
    data, weights = os.environ.get("NPAD_DATA"), os.environ.get("NPAD_WEIGHTS")
    return (
        real_embeddings(Path(data), Path(weights)) if data and weights else synthetic_embeddings()
    )


def real_embeddings(data: Path, weights: Path) -> Tensor:
    from npad.features.backbone import Backbone
    from npad.images.source import ImageSource

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


def anomalib_loop(points: Tensor, n_centroids: int) -> Tensor:
    """The loop of its coreset: all distances to the newest centre, the minimum kept, its argmax."""
    nearest = points.new_full((len(points),), torch.inf)
    index = torch.zeros((), dtype=torch.int64, device=points.device)
    chosen = [index]
    for _ in range(n_centroids - 1):
        distance = torch.linalg.vector_norm(points - points[index], dim=1)
        nearest = torch.minimum(nearest, distance)
        index = nearest.argmax()
        nearest[index] = 0
        chosen.append(index)
    return torch.stack(chosen)


@pytest.mark.cases(cpu=[Case(334, 1000), Case(334, 7802)], cuda=[Case(128, 7802)])
@pytest.mark.benchmark(group="farthest_first")
def bench_farthest_first(
    device: torch.device,
    case: Case,
    seconds: Any,
    ceilings: dict[str, float],
    benchmark: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    x = embeddings()
    torch.manual_seed(1)
    points = (x @ torch.randn(x.shape[1], case.D).div_(case.D**0.5)).to(device)
    loops = {"anomalib": anomalib_loop, "pytorch": reference.farthest_first}
    index, _ = ops.farthest_first(points, FEW)
    assert torch.equal(index, anomalib_loop(points, FEW))

    def per_centre(name: str) -> float:
        return seconds(lambda: loops[name](points, FEW)) / FEW

    before = {name: per_centre(name) for name in loops}
    own = seconds(lambda: ops.farthest_first(points, case.centres)) / case.centres
    others = {**before, "anomalib": min(before["anomalib"], per_centre("anomalib"))}
    benchmark.pedantic(lambda: None, rounds=1)
    benchmark.stats.stats.data[:] = [own * case.centres]
    ratios = {name: value / own for name, value in others.items()}
    # Of a centre that skips nothing; on a GPU, the distance and the first quarter of every head.
    least = 68 * len(points) if device.type == "cuda" else points.nbytes
    floor = least / ceilings["copy_bytes_per_s"]
    benchmark.extra_info.update(
        device=device.type,
        case=case._asdict(),
        threads=torch.get_num_threads(),
        points=list(points.shape),
        per_centre_s={"npad": own, **others},
        ratios=ratios,
        of_roofline=floor / own,
        ceilings=ceilings,
    )
    with capsys.disabled():
        text = ", ".join(f"{name} {ratio:.0f}x" for name, ratio in ratios.items())
        print(f"\nfarthest_first {case.centres}: {own * 1e3:.3f} ms/centre; {text}")
