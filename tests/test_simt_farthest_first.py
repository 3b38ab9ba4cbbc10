"""csrc/cuda/farthest_first.cu on the CPU emulator, against the plain loop over points and centres."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from accuracy import assert_accurate
from simt_device import Simt, load
from torch import Tensor

from npad.ops import _cuda, reference
from npad.ops.axes import leading_axes

AXES = 64  # rows of them, the first zero, for points of more than 96 dimensions


@pytest.fixture(params=["simt_fast", "simt_fma", "simt_checked"])
def simt(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Simt:
    """In place of the device of npad's own function, too."""
    return use(request.param, monkeypatch)


def use(name: str, monkeypatch: pytest.MonkeyPatch) -> Simt:
    simt = load(name)

    def run(op: str, x: Tensor, *arguments: Tensor | int | None) -> None:
        simt(op, *arguments, processors=1)

    sizes = SimpleNamespace(
        farthest_first_axes=partial(simt.number, "farthest_first_axes"),
        farthest_first_workspace=partial(simt.number, "farthest_first_workspace"),
    )
    monkeypatch.setattr(_cuda, "cuda", sizes)
    monkeypatch.setattr(_cuda, "_run", run)
    return simt


def launch(
    simt: Simt, points: Tensor, n_centroids: int, axes: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """With axes of one's own; also returns the workspace."""
    n, dim = points.shape
    index, radius = torch.full((n_centroids,), -1), torch.full((n_centroids,), torch.nan)
    workspace = simt.workspace("farthest_first", n, len(axes))
    mean = points.mean(0)
    args = (points, n, dim, n_centroids, 0, mean, axes, workspace, index, radius)
    simt("farthest_first", *args, processors=1)
    return index, radius, workspace


def assert_same_sequence(points: Tensor, n_centroids: int, first: int = 0) -> None:
    """In float64, which is exact on integers."""
    index, radius = _cuda.farthest_first(points, n_centroids, first)
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
        (33, 96, 16),  # the last without heads
        (70, 97, 16),  # the first with them
        (129, 100, 8),
        (33, 129, 16),
        (65, 384, 8),
    ],
)
def test_the_sequence_is_that_of_the_plain_loop(simt: Simt, n: int, dim: int, high: int) -> None:
    assert_same_sequence(integers(n, dim, high), min(n, 12), first=n // 2)


@pytest.mark.parametrize("dim", [20, 120])
def test_clusters(simt: Simt, dim: int) -> None:
    """Points near one centre and far from the next keep their distances."""
    points = 16 * integers(12, dim, 16)[:, None] + integers(360, dim, 20).view(12, 30, dim)
    points = points.flatten(0, 1)
    assert_same_sequence(points[torch.randperm(360)], 24)


@pytest.mark.parametrize("dim", [5, 100])
def test_all_points(simt: Simt, dim: int) -> None:
    assert_same_sequence(integers(45, dim, 3), 45, first=44)


@pytest.mark.parametrize("dim", [7, 100])
def test_constant_data(simt: Simt, dim: int) -> None:
    index, radius = _cuda.farthest_first(torch.full((40, dim), 0.3), 40, 20)
    assert index.tolist() == [20, *(i for i in range(40) if i != 20)]
    assert (radius == 0).all()


@pytest.mark.parametrize("dim", [8, 104])
def test_rows_that_are_not_aligned(simt: Simt, dim: int) -> None:
    points = integers(100, dim, 1000)
    storage = torch.empty(100 * dim + 1)
    storage[1:] = points.flatten()
    assert_same_sequence(storage[1:].view(100, dim), 10)


@pytest.mark.parametrize(
    ("scale", "dim"),
    [(1e-19, 50), (1e12, 50), (1e-19, 150), (1.0, 150), (1e12, 150), (1e16, 150)],
)
def test_covering_radius(simt: Simt, scale: float, dim: int) -> None:
    """At the largest scale there are no axes."""
    points = scale * (torch.randn(200, 20) * torch.arange(1, 21) ** -1.0 @ torch.randn(20, dim))
    index, radius = _cuda.farthest_first(points, 20, 0)
    covering, working = torch.empty(20).double(), torch.empty(20)
    for k in range(20):
        chosen = points[index[: k + 1]]
        covering[k], working[k] = (
            (p[:, None] - c).square().sum(-1).amin(1).max().sqrt()
            for p, c in ((points.double(), chosen.double()), (points, chosen))
        )
    assert_accurate(radius, working, covering)


@pytest.mark.parametrize("dim", [2, 100])
def test_several_launches(dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state of one launch is where the next begins."""
    use("simt_fast", monkeypatch)
    assert_same_sequence(integers(262, dim, 300), 259)


def test_heads_are_for_long_rows_and_free_memory(
    simt: Simt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without them every point is measured, and the result is the same."""
    assert [simt.number("farthest_first_axes", dim) for dim in (96, 97)] == [0, AXES]
    whole = simt.number("farthest_first_workspace", 100, AXES)
    points, chosen = integers(100, 100, 9), []

    def axes_of(rows: Tensor, n_axes: int) -> tuple[Tensor, Tensor] | None:
        chosen.append(free)
        return leading_axes(rows, n_axes)

    monkeypatch.setattr(_cuda, "leading_axes", axes_of)
    for free in (2 * whole, 2 * whole + 1):
        monkeypatch.setattr("npad.devices.free_bytes", lambda device, free=free: free)
        assert_same_sequence(points, 20)
    assert chosen == [2 * whole + 1]


def test_no_centres(simt: Simt) -> None:
    assert _cuda.farthest_first(torch.randn(3, 5), 0, 0)[0].shape == (0,)


def orthonormal(rows: int, dim: int) -> Tensor:
    return torch.linalg.qr(torch.randn(dim, rows).double()).Q.T


def some_axes(dim: int) -> Tensor:
    return torch.nn.functional.pad(orthonormal(AXES - 1, dim), (0, 0, 1, 0)).float()


def along(axes: Tensor, coordinates: Tensor) -> Tensor:
    """Points whose heads hold all of their distances: bounds are as tight as can be."""
    return coordinates @ axes[1 : 1 + coordinates.shape[1]]


def lattice() -> Tensor:
    """Distances are equal but for rounding."""
    return torch.cartesian_prod(*[torch.arange(4.0)] * 4)


def crumbs() -> Tensor:
    """Small lattices, as fine as the rounding of heads, far from one another."""
    return (300 * torch.randn(3, 1, 4) + 3e-4 * lattice()[::16]).flatten(0, 1)


def steep() -> Tensor:
    return torch.randn(256, 60) * torch.arange(1, 61) ** -1.5


@pytest.mark.parametrize(
    ("coordinates", "scale"),
    [(lattice, 1e-22), (lattice, 0.1), (crumbs, 1), (steep, 1e-19), (steep, 1)],
)
def test_heads_change_nothing(coordinates: Callable[[], Tensor], scale: float) -> None:
    """Heads that are not numbers rule nothing out, so that every distance is measured."""
    simt, axes = load("simt_fast"), some_axes(110)
    points = along(axes, scale * coordinates())
    index, radius, _ = launch(simt, points, 24, axes)
    expected, expected_radius, _ = launch(simt, points, 24, torch.full_like(axes, torch.nan))
    assert torch.equal(index, expected)
    assert torch.equal(radius, expected_radius)


def test_heads_rule_points_out() -> None:
    """Those of axes that are too long do so where they should not, which would not show otherwise."""
    simt, axes = load("simt_fast"), some_axes(110)
    points = along(axes, lattice())
    _, radius, _ = launch(simt, points, 24, axes)
    _, wrong, _ = launch(simt, points, 24, 1.05 * axes)
    assert (wrong > radius).any()


@pytest.mark.parametrize(("n", "dim"), [(1, 97), (64, 100), (97, 384)])
def test_heads(simt: Simt, n: int, dim: int) -> None:
    """The residual, then coordinates; four numbers of each of 32 points lie together."""
    points, axes = torch.randn(n, dim) + 3, some_axes(dim)
    _, _, workspace = launch(simt, points, 1, axes)
    tiles = (
        workspace[256:].view(torch.float32)[: -(-n // 64) * 64 * AXES].view(-1, AXES // 4, 32, 4)
    )
    y = points.double() - points.mean(0).double()
    head = y @ axes.double().T
    head[:, 0] = (y - head @ axes.double()).norm(dim=1)
    actual = tiles.transpose(1, 2).reshape(-1, AXES)[:n]
    torch.testing.assert_close(
        actual.double(), head, rtol=0, atol=2e-6 * y.norm(dim=1).max().item()
    )
    largest = workspace[24:28].view(torch.float32).double()
    torch.testing.assert_close(largest, head.square().sum(1).max()[None], rtol=1e-5, atol=0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite_stay_in_bounds(simt: Simt, value: float) -> None:
    """The op rejects them; the kernel still chooses points that there are, none twice."""
    points = torch.randn(70, 100)
    points[torch.randperm(70)[:40], 5] = value
    for axes in (some_axes(100), torch.tensor([])):
        index, _, _ = launch(simt, points, 50, axes)
        assert sorted(set(index.tolist())) == sorted(index.tolist())
        assert 0 <= index.min() <= index.max() < 70
