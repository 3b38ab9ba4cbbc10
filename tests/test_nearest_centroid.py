"""nearest_centroid: distance to, and index of, the nearest centroid."""

from collections.abc import Iterator

import pytest
import torch
from accuracy import assert_accurate
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode

from npad import ops
from npad.ops import reference
from npad.ops._extension import core
from npad.ops.reference import centroid_index_size


@pytest.fixture(params=core.isas())
def every_isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Also those with a kernel of their own for the index only."""
    before = core.isa()
    core.set_isa(request.param)
    yield request.param
    core.set_isa(before)


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


# --------------------------------------------------------------------------------------------------
# With an index of the centroids.


def embeddings(n: int, channels: int) -> Tensor:
    """Clusters of very different size, half of the variance in few directions: bounds work."""
    scale = torch.arange(1, channels + 1) ** -0.6
    centres = torch.randn(50, channels) * scale
    return centres[torch.randint(0, 50, (n,))] + 0.3 * torch.randn(n, channels) * scale + 0.5


def assert_index_changes_nothing(x: Tensor, centroids: Tensor) -> None:
    distance, nearest = ops.nearest_centroid(x, centroids)
    again = ops.nearest_centroid(x, centroids, ops.centroid_index(centroids))
    torch.testing.assert_close(again[0], distance, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(again[1], nearest)


@pytest.mark.parametrize("channels", [1, 31, 100, 129, 384])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (33, 17), (600, 333)])
def test_index_changes_nothing(every_isa: str, n: int, k: int, channels: int) -> None:
    both = embeddings(n + k, channels)
    assert_index_changes_nothing(both[:n], both[n:])


def test_index_without_structure(every_isa: str) -> None:
    """Bounds of isotropic noise leave nearly everything; such tiles go through the product."""
    x, centroids = torch.randn(700, 384), torch.randn(500, 384)
    x[300:500] = centroids[:200] + 0.01 * torch.randn(200, 384)  # and these do not
    assert_index_changes_nothing(x, centroids)


@pytest.mark.parametrize("scale", [1e-21, 1e-17, 1e-8, 1e14, 1e18])
def test_index_at_any_scale(every_isa: str, scale: float) -> None:
    both = embeddings(500, 40)
    assert_index_changes_nothing(both[:100] * scale, both[100:] * scale)
    assert_index_changes_nothing(both[:100], both[100:] * scale)
    assert_index_changes_nothing(both[:100] * scale, both[100:])


def test_index_far_from_the_origin(every_isa: str) -> None:
    x = torch.randint(0, 4096, (150, 50)).float() / 1024 + 1e4
    centroids = torch.randint(0, 4096, (500, 50)).float() / 1024 + 1e4
    assert_index_changes_nothing(x, centroids)
    centroids[17] = -1e6
    assert_index_changes_nothing(x, centroids)


def test_index_at_the_centroids_and_their_twins(every_isa: str) -> None:
    centroids = embeddings(300, 200)
    twins = centroids.clone()
    twins[:, 3] = torch.nextafter(twins[:, 3], torch.tensor(torch.inf))
    both = torch.cat([twins, centroids, twins])
    distance, nearest = ops.nearest_centroid(both, both, ops.centroid_index(both))
    assert (distance == 0).all()
    assert torch.equal(nearest, torch.arange(900) % 600)


@given(
    n=st.integers(1, 80),
    k=st.integers(1, 80),
    channels=st.integers(1, 20),
    high=st.integers(1, 4),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=40, deadline=None)
def test_ties_by_index_take_the_first(n: int, k: int, channels: int, high: int, seed: int) -> None:
    torch.manual_seed(seed)
    assert_index_changes_nothing(integers(n, channels, high), integers(k, channels, high))


@pytest.mark.parametrize("rank", [0, 1, 5])
def test_index_of_centroids_in_a_subspace(every_isa: str, rank: int) -> None:
    """Axes that nothing varies along, and embeddings that lie across all of them."""
    span = torch.randn(rank, 300)
    centroids = torch.randn(400, rank) @ span + 1
    x = torch.cat(
        [torch.randn(40, rank) @ span + 1, torch.randn(40, 300), 1 + 1e-4 * torch.randn(40, 300)]
    )
    assert_index_changes_nothing(x, centroids)


def test_index_counts_what_the_axes_leave(every_isa: str) -> None:
    """A centroid at the same place along the axes is farther than one that is near across them."""
    near, across = torch.randn(1000, 128), 0.45 * torch.randn(1000, 272)
    centroids = torch.cat([torch.cat([near, 0 * across], 1), torch.cat([near, across], 1)])
    x = centroids[1000:1200].clone()
    x[:, :128] += 0.05 * torch.randn(200, 128)
    _, nearest = ops.nearest_centroid(x, centroids, ops.centroid_index(centroids))
    assert torch.equal(nearest, torch.arange(1000, 1200))


def test_a_sum_that_stops_at_the_best_is_no_tie(every_isa: str) -> None:
    """All are at 64 after 64 channels; the first half is farther by the last."""
    x = torch.nn.functional.pad(2 * integers(200, 64, 2), (0, 136))
    centroids = torch.zeros(200, 200)
    centroids[:, :64] = 1
    centroids[:16, 199] = 0.01
    centroids[32:, :64] += 8 * torch.randn(168, 64).sign()  # others, far away
    distance, nearest = ops.nearest_centroid(x, centroids, ops.centroid_index(centroids))
    assert (distance == 8).all()
    assert (nearest == 16).all()


def test_index_with_nan_and_infinity(every_isa: str) -> None:
    x, centroids = embeddings(300, 130), embeddings(400, 130)
    x[3, 5], x[133, 0], x[234], x[290] = torch.nan, torch.inf, 1e30, 1e15
    assert_index_changes_nothing(x, centroids)
    for row, value in ((0, torch.nan), (399, torch.nan), (17, torch.inf), (17, 1e30), (17, 1e15)):
        hostile = centroids.clone()
        hostile[row, 7] = value
        assert_index_changes_nothing(x, hostile)


def test_index_by_batches_threads_and_strides(every_isa: str) -> None:
    x, centroids = embeddings(300, 150).T.contiguous().T, embeddings(333, 150).T.contiguous().T
    index = ops.centroid_index(centroids)
    assert torch.equal(index, ops.centroid_index(centroids.contiguous()))
    distance, nearest = ops.nearest_centroid(x, centroids, index)
    for size, threads in ((1, 1), (7, 2), (40, 3)):
        torch.set_num_threads(threads)
        parts = [ops.nearest_centroid(part, centroids, index) for part in x.split(size)]
        assert torch.equal(torch.cat([part[0] for part in parts]), distance)
        assert torch.equal(torch.cat([part[1] for part in parts]), nearest)
    assert ops.nearest_centroid(x[:0], centroids, index)[0].shape == (0,)


def test_index_of_one_instruction_set_serves_another() -> None:
    x, centroids = embeddings(100, 200), embeddings(300, 200)
    before = core.isa()
    expected = ops.nearest_centroid(x, centroids)
    try:
        indices = []
        for name in core.isas():
            core.set_isa(name)
            indices.append(ops.centroid_index(centroids))
        for name in core.isas():
            core.set_isa(name)
            for index in indices:
                _, nearest = ops.nearest_centroid(x, centroids, index)
                assert torch.equal(nearest, expected[1])
    finally:
        core.set_isa(before)


def test_index_is_in_use(every_isa: str) -> None:
    """An index that says that every centroid but one is far away is believed."""
    x, centroids = embeddings(64, 150), embeddings(320, 150)
    index = ops.centroid_index(centroids)
    assert index[0] != 0
    panels = index[16 : 16 + 20 * (48 + 512)].view(torch.float32).view(20, 48 + 512)
    panels[:, :16] = 1e9
    panels[7, 5] = -1e9
    _, nearest = ops.nearest_centroid(x, centroids, index)
    assert (nearest == 117).all() == (every_isa != "baseline")


def test_reference_index_is_no_index() -> None:
    x, centroids = embeddings(64, 30), embeddings(80, 30)
    index = reference.centroid_index(centroids)
    size = centroid_index_size(80, 30, torch.int32)
    assert index.shape == ops.centroid_index(centroids).shape == (size,)
    expected = ops.nearest_centroid(x, centroids)
    assert torch.equal(ops.nearest_centroid(x, centroids, index)[0], expected[0])


def test_index_made_for_a_gpu_is_no_index() -> None:
    """As a program that was exported there brings it; what it holds is not read."""
    x, centroids = embeddings(64, 30), embeddings(80, 30)
    index = torch.full((centroid_index_size(80, 30, torch.uint8),), 0x7F, dtype=torch.uint8)
    expected = ops.nearest_centroid(x, centroids)
    for found, right in zip(ops.nearest_centroid(x, centroids, index), expected, strict=True):
        assert torch.equal(found, right)


def test_fake_index_on_a_gpu() -> None:
    """Tensors that only say that they are on a GPU stand for those that are."""
    with FakeTensorMode():
        centroids = torch.empty(130, 40, device="cuda")
        for index in (ops.centroid_index(centroids), reference.centroid_index(centroids)):
            assert index.dtype == torch.uint8
            assert index.shape == (centroid_index_size(130, 40, torch.uint8),)
            distance, _ = ops.nearest_centroid(torch.empty(9, 40, device="cuda"), centroids, index)
            assert distance.shape == (9,)


def test_opcheck() -> None:
    torch.library.opcheck(
        torch.ops.npad.nearest_centroid.default, (torch.randn(9, 5), torch.randn(4, 5))
    )
    centroids = torch.randn(40, 130)
    torch.library.opcheck(torch.ops.npad.centroid_index.default, (centroids,))
    torch.library.opcheck(
        torch.ops.npad.nearest_centroid.default,
        (torch.randn(9, 130), centroids, ops.centroid_index(centroids)),
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
    index = ops.centroid_index(centroids)
    size = centroid_index_size(4, 5, torch.int32)
    with pytest.raises(ValueError, match=rf"index must have shape \(size\) = \({size},\)"):
        ops.nearest_centroid(x, centroids, index[:-1])
    with pytest.raises(TypeError, match="index must be int32 or uint8, got float64"):
        ops.nearest_centroid(x, centroids, index.double())
    with pytest.raises(ValueError, match="index is on meta but x is on cpu"):
        ops.nearest_centroid(x, centroids, index.to("meta"))
    with pytest.raises(ValueError, match="centroid_index: centroids must not be empty"):
        ops.centroid_index(centroids[:0])
    with pytest.raises(TypeError, match="centroids must be float32, got float64"):
        ops.centroid_index(centroids.double())
