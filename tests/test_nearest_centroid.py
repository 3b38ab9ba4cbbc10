"""nearest_centroid: distance and index without an N x K matrix."""

import pytest
import torch
from accuracy import assert_accurate
from torch import Tensor

from npad import ops, reference


def check(x: Tensor, centroids: Tensor) -> None:
    distance, index = ops.nearest_centroid(x, centroids)
    oracle, _ = reference.nearest_centroid(x.double(), centroids.double())
    working, _ = reference.nearest_centroid(x, centroids)
    assert_accurate(distance, working, oracle)
    chosen = (x.double() - centroids[index].double()).norm(dim=1)
    torch.testing.assert_close(chosen, oracle, rtol=1e-6, atol=1e-6 * float(oracle.max() + 1))


@pytest.mark.parametrize("channels", [1, 7, 16, 31, 129])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (13, 33), (250, 500), (31, 129)])
def test_against_reference(isa: str, n: int, k: int, channels: int) -> None:
    check(torch.randn(n, channels), torch.randn(k, channels))


def test_offset_cancels(isa: str) -> None:
    """Ranking stays that of float32 differences where values are 1e4 and distances 1."""
    x, centroids = torch.randn(60, 40) + 1e4, torch.randn(90, 40) + 1e4
    check(x, centroids)


def test_near_zero_distances_are_exact(isa: str) -> None:
    """Centroids that are embeddings are found at distance 0, among neighbours 1e-5 away."""
    centroids = torch.randn(200, 64) * 10
    crowd = centroids + 1e-5 * torch.randn(200, 64)
    order = torch.randperm(200)
    distance, index = ops.nearest_centroid(centroids[order], torch.cat([crowd, centroids]))
    assert (distance == 0).all()
    assert torch.equal(index, order + 200)


def test_ties_take_the_first(isa: str) -> None:
    centroids = torch.randn(5, 9).repeat(20, 1)
    _, index = ops.nearest_centroid(torch.randn(70, 9), centroids)
    assert (index < 5).all()
    grid = torch.tensor([[-1.0], [1.0], [3.0]])
    assert ops.nearest_centroid(torch.tensor([[0.0], [2.0]]), grid)[1].tolist() == [0, 1]


def test_nan_and_infinity(isa: str) -> None:
    x = torch.randn(30, 8)
    x[3, 2] = torch.nan
    x[17, 0] = torch.inf
    distance, index = ops.nearest_centroid(x, torch.randn(40, 8))
    assert distance.isnan().nonzero().flatten().tolist() == [3]
    assert distance.isinf().nonzero().flatten().tolist() == [17]
    assert index[3] == 0


def test_strides_threads_and_empty(isa: str) -> None:
    x, centroids = torch.randn(31, 500).T, torch.randn(31, 77).T
    torch.set_num_threads(1)
    expected = ops.nearest_centroid(x.contiguous(), centroids.contiguous())
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for a, b in zip(ops.nearest_centroid(x, centroids), expected, strict=True):
            assert torch.equal(a, b)
    assert ops.nearest_centroid(x[:0], centroids)[0].shape == (0,)


def test_opcheck() -> None:
    torch.library.opcheck(
        torch.ops.npad.nearest_centroid.default, (torch.randn(5, 4), torch.randn(3, 4))
    )


def test_rejects() -> None:
    x = torch.randn(5, 4)
    with pytest.raises(TypeError, match="x must be float32, got float64"):
        ops.nearest_centroid(x.double(), x)
    with pytest.raises(ValueError, match=r"x must have shape \(N, C\) = \(5, 3\), got \(5, 4\)"):
        ops.nearest_centroid(x, x[:, :3])
    with pytest.raises(ValueError, match="centroids must not be empty"):
        ops.nearest_centroid(x, x[:0])
    with pytest.raises(ValueError, match="x must have two dimensions"):
        ops.nearest_centroid(x[0], x)
