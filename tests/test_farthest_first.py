"""farthest_first: the exact greedy sequence, whatever is skipped on the way."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from npad import ops, reference


def whole_numbers(n: int, dim: int, largest: int = 8) -> Tensor:
    """Points whose squared distances are exact in float32, so the sequence can be compared."""
    return torch.randint(-largest, largest + 1, (n, dim)).float()


def check(points: Tensor, n_centroids: int, first: int = 0) -> None:
    index, radius = ops.farthest_first(points, n_centroids, first)
    oracle, oracle_radius = reference.farthest_first(points.double(), n_centroids, first)
    assert torch.equal(index, oracle)
    torch.testing.assert_close(radius.double(), oracle_radius, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dim", [1, 3, 16, 31, 70, 334])
@pytest.mark.parametrize("n", [1, 2, 17, 400])
def test_sequence_is_that_of_the_plain_loop(isa: str, n: int, dim: int) -> None:
    check(whole_numbers(n, dim), n, first=n // 2)


def test_many_points(isa: str) -> None:
    check(whole_numbers(20000, 20, largest=20), 150, first=19999)


@given(
    n=st.integers(1, 60),
    dim=st.integers(1, 4),
    largest=st.integers(0, 3),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60, deadline=None)
def test_ties_and_duplicates(n: int, dim: int, largest: int, seed: int) -> None:
    torch.manual_seed(seed)
    check(whole_numbers(n, dim, largest), n, first=seed % n)


def test_clusters(isa: str) -> None:
    """Tight clusters far apart: one centre in each before a second in any."""
    centres = torch.randn(40, 24) * 100
    points = (centres[:, None] + 0.01 * torch.randn(40, 50, 24)).flatten(0, 1)
    index, radius = ops.farthest_first(points, 60)
    assert len(set((index[:40] // 50).tolist())) == 40
    assert radius[39] < 1 < radius[38]


def test_covering_radius_is_true_and_within_twice_the_best() -> None:
    points = torch.randn(300, 2).double()
    index, radius = ops.farthest_first(points.float(), 25)
    distance = torch.cdist(points, points[index])
    for k in (0, 5, 24):
        covering = distance[:, : k + 1].min(1).values.max()
        assert radius[k] == pytest.approx(float(covering), rel=1e-5)
    assert (radius[1:] <= radius[:-1]).all()
    # k + 1 points pairwise at least radius[k - 1] apart: no k balls of half of it can cover them.
    pairwise = torch.cdist(points[index], points[index]) + 1e9 * torch.eye(25)
    assert pairwise.min() >= radius[23] * (1 - 1e-5)


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_real_valued_data(isa: str, offset: float) -> None:
    """Where rounding may swap near ties, every radius still agrees."""
    mix = torch.randn(50, 50) * torch.logspace(0, -2, 50)
    points = torch.randn(3000, 50) @ mix + offset
    _, radius = ops.farthest_first(points, 200)
    _, oracle = reference.farthest_first(points.double(), 200)
    torch.testing.assert_close(radius.double(), oracle, rtol=2e-3, atol=0)


def test_constant_points(isa: str) -> None:
    index, radius = ops.farthest_first(torch.full((40, 5), 3.25), 40, first=7)
    assert sorted(index.tolist()) == list(range(40))
    assert index[0] == 7
    assert (radius == 0).all()


def test_threads_strides_and_rerun(isa: str) -> None:
    points = torch.randn(30, 6000).T
    torch.set_num_threads(1)
    expected = ops.farthest_first(points.contiguous(), 120)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for a, b in zip(ops.farthest_first(points, 120), expected, strict=True):
            assert torch.equal(a, b)


def test_progress_and_interrupt() -> None:
    points = torch.randn(20000, 32)
    calls: list[tuple[int, int]] = []
    with ops.report_progress(lambda done, total: calls.append((done, total))):
        ops.farthest_first(points, 300)
    assert calls[-1] == (300, 300)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with ops.report_progress(interrupt), pytest.raises(KeyboardInterrupt):
        ops.farthest_first(points, 300)


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.npad.farthest_first.default, (torch.randn(9, 4), 3, 0))


def test_rejects() -> None:
    points = torch.randn(5, 4)
    with pytest.raises(TypeError, match="points must be float32, got float64"):
        ops.farthest_first(points.double(), 2)
    with pytest.raises(ValueError, match="n_centroids must be 1 to the number of points 5, got 6"):
        ops.farthest_first(points, 6)
    with pytest.raises(ValueError, match="first must be 0 to 4, got 5"):
        ops.farthest_first(points, 2, first=5)
    with pytest.raises(ValueError, match=r"points must have shape \(N, D\)"):
        ops.farthest_first(points[:0], 1)
    for bad in (torch.nan, torch.inf):
        points[2, 1] = bad
        with pytest.raises(ValueError, match="points hold NaN or infinite values"):
            ops.farthest_first(points, 2)
