"""farthest_first: greedy k-center."""

import signal
import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from npad import ops
from npad.ops import reference


def integers(n: int, dim: int, high: int) -> Tensor:
    """Coordinates whose squared distances are exact in float32, so that ties are exact too."""
    return torch.randint(0, high, (n, dim)).float()


def assert_same_sequence(points: Tensor, n_centroids: int, first: int = 0) -> None:
    """The plain loop over all points and centres, in float64, which is exact on integers."""
    index, radius = ops.farthest_first(points, n_centroids, first)
    expected, expected_radius = reference.farthest_first(points.double(), n_centroids, first)
    assert torch.equal(index, expected)
    assert torch.equal(radius, expected_radius.float())


@pytest.mark.parametrize(
    ("n", "dim", "high"),
    [
        (1, 1, 3),
        (2, 1, 1000),
        (17, 1, 5),  # mostly duplicates
        (100, 2, 1000),
        (1000, 3, 4),  # every point many times: ties everywhere
        (1500, 16, 2),
        (1300, 31, 8),
        (1300, 62, 8),
        (1300, 65, 8),
        (2100, 129, 16),
        (1025, 384, 32),
    ],
)
def test_the_sequence_is_that_of_the_plain_loop(isa: str, n: int, dim: int, high: int) -> None:
    points = integers(n, dim, high)
    assert_same_sequence(points, min(n, 150), first=n // 2)


def test_clusters_of_very_different_size(isa: str) -> None:
    """A dense cluster, a wide one and one far outlier, around an offset of 2^16."""
    points = torch.cat(
        [integers(900, 40, 4), 64 * integers(300, 40, 16), integers(1, 40, 2) + 8192]
    )
    assert_same_sequence(points[torch.randperm(len(points))] + 2**16, 300)


def test_all_points(isa: str) -> None:
    points = integers(300, 5, 30)
    assert_same_sequence(points, 300, first=299)


@given(
    n=st.integers(1, 120),
    dim=st.integers(1, 12),
    high=st.integers(1, 5),
    data=st.data(),
)
@settings(max_examples=100, deadline=None)
def test_ties_and_duplicates(n: int, dim: int, high: int, data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 2**16)))
    points = integers(n, dim, high)
    n_centroids, first = data.draw(st.integers(1, n)), data.draw(st.integers(0, n - 1))
    assert_same_sequence(points, n_centroids, first)
    index, radius = ops.farthest_first(points, n_centroids, first)
    assert len(index.unique()) == n_centroids
    assert (radius.diff() <= 0).all()
    if n_centroids >= len(points.unique(dim=0)):
        assert radius[-1] == 0


def test_constant_data(isa: str) -> None:
    index, radius = ops.farthest_first(torch.full((50, 7), 0.3), 50, 20)
    assert index.tolist() == [20, *(i for i in range(50) if i != 20)]
    assert (radius == 0).all()


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12, 1e16])
def test_radius_is_the_covering_radius(isa: str, scale: float) -> None:
    """On data of low rank and decaying variance, as embeddings have; at the largest without axes."""
    points = torch.randn(3000, 20) * torch.arange(1, 21) ** -1.0 @ torch.randn(20, 150)
    points = scale * (points + 0.05 * torch.randn(3000, 150)) + scale
    index, radius = ops.farthest_first(points, 200)
    for k in (0, 1, 20, 199):
        chosen = points[index[: k + 1]].double() / scale
        covering = torch.cdist(points.double() / scale, chosen).min(1).values.max()
        torch.testing.assert_close(radius[k].double() / scale, covering, rtol=1e-5, atol=0)


def test_within_twice_the_best_radius() -> None:
    """Gonzalez' bound, where the best is known: 30 balls of radius 1, far apart."""
    centres = 20 * torch.randn(30, 8).sign().cumsum(0)
    offsets = torch.nn.functional.normalize(torch.randn(30, 50, 8), dim=-1)
    points = (centres[:, None] + offsets).reshape(-1, 8)
    _, radius = ops.farthest_first(points, 30)
    assert radius[-1] <= 2


def test_strides_threads_and_rerun(isa: str) -> None:
    points = torch.randn(90, 2500).T
    torch.set_num_threads(1)
    index, radius = ops.farthest_first(points.contiguous(), 70, 7)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for _ in range(2):
            again = ops.farthest_first(points, 70, 7)
            assert torch.equal(again[0], index)
            assert torch.equal(again[1], radius)


def test_progress_is_reported() -> None:
    calls: list[tuple[int, int]] = []
    with ops.report_progress(lambda done, total: calls.append((done, total))):
        ops.farthest_first(torch.randn(2000, 100), 300)
    assert calls[-1] == (300, 300)
    assert calls == sorted(calls)
    assert len(calls) < 300  # now and then, not every centre


def test_progress_can_stop_it() -> None:
    class StopError(Exception):
        pass

    def stop(done: int, total: int) -> None:
        raise StopError

    with ops.report_progress(stop), pytest.raises(StopError):
        ops.farthest_first(torch.randn(2000, 100), 300)


def test_ctrl_c_stops_it() -> None:
    points = torch.randn(30000, 256)  # without structure nothing can be ruled out: minutes of work
    interrupt = threading.Timer(0.5, signal.raise_signal, [signal.SIGINT])
    start = time.monotonic()
    interrupt.start()
    with pytest.raises(KeyboardInterrupt):
        ops.farthest_first(points, 30000)
    assert time.monotonic() - start < 20


def test_too_many_points() -> None:
    with pytest.raises(ValueError, match="at most 4294967294 points, got 4294967296"):
        ops.farthest_first(torch.zeros(1, 1).expand(2**32, 1), 1)


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.npad.farthest_first.default, (torch.randn(40, 5), 7, 3))


def test_rejects() -> None:
    points = torch.randn(9, 5)
    with pytest.raises(TypeError, match="points must be float32, got float16"):
        ops.farthest_first(points.half(), 2)
    with pytest.raises(ValueError, match="n_centroids must be 1 to the number of points 9, got 10"):
        ops.farthest_first(points, 10)
    with pytest.raises(ValueError, match="first must be 0 to 8, got 9"):
        ops.farthest_first(points, 2, 9)
    with pytest.raises(ValueError, match=r"points must have shape \(N, D\)"):
        ops.farthest_first(points[0], 1)
    points[4, 4] = torch.nan
    with pytest.raises(ValueError, match="points hold NaN or infinite values"):
        ops.farthest_first(points, 2)
