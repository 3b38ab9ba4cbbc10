"""csrc/cuda/nearest_centroid.cu on the CPU emulator."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_accurate
from op_cases import off_by_one
from simt_device import Simt, load
from simt_wrappers import use
from torch import Tensor

from npad.learned import LearnedMember
from npad.members import Member
from npad.ops import reference
from npad.scoring.scorer import MemberScorer


@pytest.fixture(params=["simt_fast", "simt_fma", "simt_sm75", "simt_checked"])
def simt(request: pytest.FixtureRequest) -> Simt:
    return load(request.param)


def indexed(simt: Simt, centroids: Tensor) -> Tensor:
    size = simt.number("centroid_index_bytes", *centroids.shape)
    index = torch.full((size,), 0xFF, dtype=torch.uint8)
    simt("centroid_index", centroids, *centroids.shape, index)
    return index


def search(simt: Simt, x: Tensor, centroids: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    (n, channels), k = x.shape, len(centroids)
    distance, nearest = torch.full((n,), -1.0), torch.full((n,), -1)
    workspace = simt.workspace("nearest_centroid", n, k, channels)
    simt("nearest_centroid", x, n, centroids, k, channels, index, workspace, distance, nearest)
    return distance, nearest


def run(simt: Simt, x: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    return search(simt, x, centroids, indexed(simt, centroids))


@pytest.mark.parametrize(
    ("n", "k", "channels"),
    [
        (1, 1, 1),
        (12, 5, 7),
        (40, 33, 8),
        (130, 40, 17),
        (5, 300, 31),
        (33, 129, 33),
        (12, 64, 100),
        (20, 130, 129),
    ],
)
def test_against_reference(simt: Simt, n: int, k: int, channels: int) -> None:
    x, centroids = torch.randn(n, channels), torch.randn(k, channels)
    distance, index = run(simt, x, centroids)
    working, _ = reference.nearest_centroid(x, centroids)
    oracle, expected = reference.nearest_centroid(x.double(), centroids.double())
    assert_accurate(distance, working, oracle)
    assert torch.equal(index, expected)


def test_more_rows_of_tiles_than_one_swath() -> None:
    x, centroids = torch.randn(17 * 128 + 5, 3), torch.randn(200, 3)
    _, index = run(load("simt_fast"), x, centroids)
    _, expected = reference.nearest_centroid(x.double(), centroids.double())
    assert (index == expected).float().mean() > 0.999


def test_far_from_the_origin(simt: Simt) -> None:
    """An offset of 1e4 leaves float32 a grid of 1e-3, on which both sides are exact."""
    x = torch.randint(0, 4096, (50, 50)).float() / 1024 + 1e4
    centroids = torch.randint(0, 4096, (140, 50)).float() / 1024 + 1e4
    distance, index = run(simt, x, centroids)
    oracle, expected = reference.nearest_centroid(x.double(), centroids.double())
    assert torch.equal(index, expected)
    torch.testing.assert_close(distance.double(), oracle, rtol=1e-6, atol=0)


def test_one_outlying_centroid_costs_no_accuracy(simt: Simt) -> None:
    x, centroids = torch.randn(20, 33), torch.randn(100, 33)
    centroids[17] = 1e6
    distance, index = run(simt, x, centroids)
    oracle, expected = reference.nearest_centroid(x.double(), centroids.double())
    assert torch.equal(index, expected)
    torch.testing.assert_close(distance.double(), oracle, rtol=1e-5, atol=0)


def test_zero_at_a_centroid_next_to_a_twin(simt: Simt) -> None:
    """The product alone could not tell these apart: they differ in the last bit."""
    centroids = torch.randn(64, 40)
    twins = centroids.clone()
    twins[:, 3] = torch.nextafter(twins[:, 3], torch.tensor(torch.inf))
    distance, index = run(simt, centroids, torch.cat([twins, centroids]))
    assert (distance == 0).all()
    assert torch.equal(index, torch.arange(64, 128))


@pytest.mark.parametrize(("n", "k", "channels", "high"), [(20, 300, 2, 3), (30, 150, 20, 2)])
def test_ties_take_the_first(simt: Simt, n: int, k: int, channels: int, high: int) -> None:
    x = torch.randint(0, high, (n, channels)).float()
    centroids = torch.randint(0, high, (k, channels)).float()
    squared = (x[:, None] - centroids).square().sum(-1)
    distance, index = run(simt, x, centroids)
    assert torch.equal(distance, squared.amin(1).double().sqrt().float())
    first = (squared == squared.amin(1, keepdim=True)).int().argmax(1)
    assert torch.equal(index, first)


def test_duplicates_in_other_groups(simt: Simt) -> None:
    centroids = torch.randn(100, 20)
    x = centroids[::7] + 0.01 * torch.randn(15, 20)
    _, index = run(simt, x, torch.cat([centroids, centroids, centroids]))
    assert torch.equal(index, torch.arange(0, 100, 7))


def test_nan_and_infinity(simt: Simt) -> None:
    x, centroids = torch.randn(40, 12), torch.randn(140, 12)
    expected, _ = run(simt, x, centroids)
    x[3, 5], x[33, 0], x[34] = torch.nan, torch.inf, 1e30
    distance, index = run(simt, x, centroids)
    assert distance.isnan().nonzero().tolist() == [[3]]
    assert distance.isinf().nonzero().tolist() == [[33], [34]]
    assert index[[3, 33, 34]].tolist() == [0, 0, 0]
    keep = [i for i in range(40) if i not in (3, 33, 34)]
    assert torch.equal(distance[keep], expected[keep])


def test_infinite_centroid(simt: Simt) -> None:
    x, centroids = torch.randn(10, 12), torch.randn(40, 12)
    centroids[:9, 3] = torch.inf
    _, index = run(simt, x, centroids)
    _, expected = reference.nearest_centroid(x.double(), centroids.double())
    assert torch.equal(index, expected)


@pytest.mark.parametrize("scale", [1e-30, 1e-19, 1e15])
def test_extreme_scales(simt: Simt, scale: float) -> None:
    x, centroids = scale * torch.randn(9, 12), scale * torch.randn(40, 12)
    distance, index = run(simt, x, centroids)
    working, expected = reference.nearest_centroid(x, centroids)
    assert torch.equal(distance > 0, working > 0)
    assert scale < 1e-18 or torch.equal(index, expected)


def test_rows_that_are_not_aligned(simt: Simt) -> None:
    """Rows that start anywhere give the same bits as rows at 16 bytes."""
    x, centroids = torch.randn(30, 36), torch.randn(20, 36)
    expected = *run(simt, x, centroids), indexed(simt, centroids)
    x_elsewhere, elsewhere = off_by_one((x, centroids))
    assert isinstance(x_elsewhere, Tensor)
    assert isinstance(elsewhere, Tensor)
    for a, b in ((x_elsewhere, centroids), (x, elsewhere), (x_elsewhere, elsewhere)):
        for found, right in zip((*run(simt, a, b), indexed(simt, b)), expected, strict=True):
            assert torch.equal(found, right)


@pytest.mark.parametrize(("k", "channels"), [(1, 1), (128, 32), (129, 33), (300, 100)])
def test_size_of_an_index(k: int, channels: int) -> None:
    """Python has to know it, too, for tensors that are not there."""
    size = load("simt_fast").number("centroid_index_bytes", k, channels)
    assert size == reference.centroid_index_size(k, channels, torch.uint8)


def test_zeros_for_an_index(simt: Simt) -> None:
    """Which is what the reference makes: then all centroids are measured."""
    x, centroids = torch.randn(9, 33), torch.randn(130, 33)
    x[2, 3], x[3, 4], x[4] = torch.nan, torch.inf, 1e30
    found = search(simt, x, centroids, torch.zeros_like(indexed(simt, centroids)))
    for a, b in zip(found, run(simt, x, centroids), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_the_index_is_made_where_the_centroids_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of a CPU, before a scorer is moved, changes nothing; moving makes another."""
    member, centroids = Member(0, (1,), gaussian=False), torch.randn(50, 9)
    learned = LearnedMember(member, 9, (4, 3), None, None, None, centroids=centroids)
    scorer = MemberScorer(learned, 1)
    x = torch.randn(2, 4, 3, 9)
    expected = scorer(x)["euclidean"]
    launched: list[str] = []
    use(load("simt_fast"), monkeypatch.setattr, lambda op, _: launched.append(op))
    assert_accurate(scorer(x)["euclidean"], expected, expected)
    assert launched == ["centroid_index", "nearest_centroid"]
    scorer.to("cpu")  # which is a GPU now
    assert launched == ["centroid_index", "nearest_centroid", "centroid_index"]
    for _ in range(2):
        assert_accurate(scorer(x)["euclidean"], expected, expected)
    assert launched[3:] == ["nearest_centroid", "nearest_centroid"]


def test_no_embeddings(simt: Simt) -> None:
    distance, index = run(simt, torch.empty(0, 5), torch.randn(3, 5))
    assert distance.shape == index.shape == (0,)
