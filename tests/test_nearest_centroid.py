"""nearest_centroid: distance to, and index of, the nearest centroid."""

import pytest
import torch
from accuracy import assert_accurate
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from npad import ops, reference


def integers(n: int, channels: int, high: int) -> Tensor:
    """Coordinates whose squared distances are exact in float32, so that ties are exact too."""
    return torch.randint(0, high, (n, channels)).float()


@pytest.mark.parametrize("channels", [1, 7, 16, 31, 100, 129, 384])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (31, 13), (33, 15), (129, 300), (600, 85)])
def test_against_reference(isa: str, n: int, k: int, channels: int) -> None:
    x, centroids = torch.randn(n, channels), torch.randn(k, channels)
    distance, index = ops.nearest_centroid(x, centroids)
    working, _ = reference.nearest_centroid(x, centroids)
    oracle, expected = reference.nearest_centroid(x.double(), centroids.double())
    assert_accurate(distance, working, oracle)
    assert (index == expected).float().mean() > 0.99  # float32 may settle a near tie otherwise
    assert_accurate((x - centroids[index]).norm(dim=1), working, oracle)


def test_far_from_the_origin(isa: str) -> None:
    """An offset of 1e4 leaves float32 a grid of 1e-3, on which both sides are exact."""
    x = torch.randint(0, 4096, (150, 50)).float() / 1024 + 1e4
    centroids = torch.randint(0, 4096, (500, 50)).float() / 1024 + 1e4
    distance, index = ops.nearest_centroid(x, centroids)
    oracle, expected = reference.nearest_centroid(x.double(), centroids.double())
    assert torch.equal(index, expected)
    torch.testing.assert_close(distance.double(), oracle, rtol=1e-6, atol=0)


def test_one_outlying_centroid_costs_no_accuracy(isa: str) -> None:
    x, centroids = torch.randn(200, 33), torch.randn(100, 33)
    centroids[17] = 1e6
    distance, index = ops.nearest_centroid(x, centroids)
    oracle, expected = reference.nearest_centroid(x.double(), centroids.double())
    assert torch.equal(index, expected)
    torch.testing.assert_close(distance.double(), oracle, rtol=1e-5, atol=0)


def test_zero_at_a_centroid_next_to_a_twin(isa: str) -> None:
    """The product alone could not tell these apart: they differ in the last bit."""
    centroids = torch.randn(64, 40)
    twins = centroids.clone()
    twins[:, 3] = torch.nextafter(twins[:, 3], torch.tensor(torch.inf))
    distance, index = ops.nearest_centroid(centroids, torch.cat([twins, centroids]))
    assert (distance == 0).all()
    assert torch.equal(index, torch.arange(64, 128))


@given(
    n=st.integers(1, 80),
    k=st.integers(1, 80),
    channels=st.integers(1, 20),
    high=st.integers(1, 4),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60, deadline=None)
def test_ties_take_the_first(n: int, k: int, channels: int, high: int, seed: int) -> None:
    torch.manual_seed(seed)
    x, centroids = integers(n, channels, high), integers(k, channels, high)
    squared = (x[:, None] - centroids).square().sum(-1)
    distance, index = ops.nearest_centroid(x, centroids)
    assert torch.equal(distance, squared.amin(1).double().sqrt().float())
    first = (squared == squared.amin(1, keepdim=True)).int().argmax(1)
    assert torch.equal(index, first)


def test_more_centroids_than_are_packed_at_a_time(isa: str) -> None:
    """Two blocks of packed centroids; the same centroid in both is found in the first."""
    channels = 1024
    centroids = torch.randn(2000, channels)
    k = 2 * (12 << 20) // (4 * channels)
    many = centroids[torch.arange(k) % len(centroids)].contiguous()
    x = centroids[::40] + 0.01 * torch.randn(50, channels)
    _, index = ops.nearest_centroid(x, many)
    assert torch.equal(index, torch.arange(0, 2000, 40))
    last = torch.cat([many, x])
    distance, index = ops.nearest_centroid(x, last)
    assert torch.equal(index, k + torch.arange(50))
    assert (distance == 0).all()


def test_nan_and_infinity(isa: str) -> None:
    x, centroids = torch.randn(70, 12), torch.randn(40, 12)
    expected, _ = ops.nearest_centroid(x, centroids)
    x[3, 5], x[33, 0], x[34] = torch.nan, torch.inf, 1e30
    distance, index = ops.nearest_centroid(x, centroids)
    assert distance.isnan().nonzero().tolist() == [[3]]
    assert distance.isinf().nonzero().tolist() == [[33], [34]]
    assert index[[3, 33, 34]].tolist() == [0, 0, 0]
    keep = [i for i in range(70) if i not in (3, 33, 34)]
    assert torch.equal(distance[keep], expected[keep])


def test_no_embeddings() -> None:
    distance, index = ops.nearest_centroid(torch.empty(0, 5), torch.randn(3, 5))
    assert distance.shape == index.shape == (0,)


def test_strides_threads_batches_and_rerun(isa: str) -> None:
    x, centroids = torch.randn(31, 700).T, torch.randn(31, 333).T
    torch.set_num_threads(1)
    distance, index = ops.nearest_centroid(x.contiguous(), centroids.contiguous())
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for _ in range(2):
            again = ops.nearest_centroid(x, centroids)
            assert torch.equal(again[0], distance)
            assert torch.equal(again[1], index)
    alone = [ops.nearest_centroid(row, centroids)[0] for row in x[::50].split(1)]
    assert torch.equal(torch.cat(alone), distance[::50])


def test_opcheck() -> None:
    torch.library.opcheck(
        torch.ops.npad.nearest_centroid.default, (torch.randn(9, 5), torch.randn(4, 5))
    )


def test_rejects() -> None:
    x, centroids = torch.randn(9, 5), torch.randn(4, 5)
    with pytest.raises(TypeError, match="x must be float32, got float64"):
        ops.nearest_centroid(x.double(), centroids)
    with pytest.raises(ValueError, match=r"x must have shape \(N, C\) = \(9, 4\), got \(9, 5\)"):
        ops.nearest_centroid(x, centroids[:, :4])
    with pytest.raises(ValueError, match="centroids must not be empty"):
        ops.nearest_centroid(x, centroids[:0])
    with pytest.raises(ValueError, match="centroids must have two dimensions"):
        ops.nearest_centroid(x, centroids[0])
    with pytest.raises(ValueError, match="centroids is on meta but x is on cpu"):
        ops.nearest_centroid(x, centroids.to("meta"))
