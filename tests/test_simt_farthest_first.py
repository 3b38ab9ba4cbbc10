"""csrc/cuda/farthest_first.cu on the CPU emulator, against the plain loop over points and centres."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_accurate
from simt_device import Simt, load
from torch import Tensor

from npad import reference


@pytest.fixture(params=["simt_fast", "simt_checked"])
def simt(request: pytest.FixtureRequest) -> Simt:
    return load(request.param)


def run(simt: Simt, points: Tensor, n_centroids: int, first: int = 0) -> tuple[Tensor, Tensor]:
    n, dim = points.shape
    index, radius = torch.full((n_centroids,), -1), torch.full((n_centroids,), torch.nan)
    workspace = simt.workspace("farthest_first", n, dim)
    args = (points, n, dim, n_centroids, first, workspace, index, radius)
    simt("farthest_first", *args, processors=1)
    return index, radius


def assert_same_sequence(simt: Simt, points: Tensor, n_centroids: int, first: int = 0) -> None:
    """In float64, which is exact on integers."""
    index, radius = run(simt, points, n_centroids, first)
    expected, expected_radius = reference.farthest_first(points.double(), n_centroids, first)
    assert torch.equal(index, expected)
    assert torch.equal(radius, expected_radius.float())


def integers(n: int, dim: int, high: int) -> Tensor:
    """Coordinates whose squared distances are exact in float32, so that ties are exact too."""
    return torch.randint(0, high, (n, dim)).float()


@pytest.mark.parametrize(
    ("n", "dim", "high"),
    [
        (1, 1, 3),
        (2, 7, 9),
        (40, 1, 5),  # mostly duplicates
        (100, 8, 1000),
        (600, 3, 4),  # every point many times: ties everywhere
        (700, 17, 2),
        (1100, 31, 8),
        (65, 33, 8),
        (129, 100, 8),
        (33, 129, 16),
    ],
)
def test_the_sequence_is_that_of_the_plain_loop(simt: Simt, n: int, dim: int, high: int) -> None:
    assert_same_sequence(simt, integers(n, dim, high), min(n, 20), first=n // 2)


def test_clusters_are_skipped_without_a_trace(simt: Simt) -> None:
    """Points near one centre and far from the next keep their distances unread."""
    points = 64 * integers(12, 20, 16)[:, None] + integers(600, 20, 80).view(12, 50, 20)
    points = points.flatten(0, 1)
    assert_same_sequence(simt, points[torch.randperm(600)], 40)


def test_all_points(simt: Simt) -> None:
    assert_same_sequence(simt, integers(45, 5, 3), 45, first=44)


def test_constant_data(simt: Simt) -> None:
    index, radius = run(simt, torch.full((40, 7), 0.3), 40, 20)
    assert index.tolist() == [20, *(i for i in range(40) if i != 20)]
    assert (radius == 0).all()


def test_rows_that_are_not_aligned(simt: Simt) -> None:
    points = integers(100, 8, 1000)
    storage = torch.empty(801)
    storage[1:] = points.flatten()
    assert_same_sequence(simt, storage[1:].view(100, 8), 10)


@pytest.mark.parametrize("scale", [1e-19, 1e-12, 1.0, 1e12])
def test_covering_radius(simt: Simt, scale: float) -> None:
    points = scale * (torch.randn(300, 20) * torch.arange(1, 21) ** -1.0 @ torch.randn(20, 50))
    index, radius = run(simt, points, 25)
    covering, working = torch.empty(25).double(), torch.empty(25)
    for k in range(25):
        chosen = points[index[: k + 1]]
        covering[k], working[k] = (
            (p[:, None] - c).square().sum(-1).amin(1).max().sqrt()
            for p, c in ((points.double(), chosen.double()), (points, chosen))
        )
    assert_accurate(radius, working, covering)


def test_several_launches() -> None:
    """The state of one launch is where the next begins."""
    assert_same_sequence(load("simt_fast"), integers(280, 2, 1000), 270)


def test_no_centres(simt: Simt) -> None:
    assert run(simt, torch.randn(3, 5), 0)[0].shape == (0,)
