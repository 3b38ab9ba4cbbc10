"""NominalSet: bounded bank, composition, k-center and k-means."""

import sys

import pytest
import torch
from torch import Tensor

from npad import reference
from npad.nominal_set import NominalSet


def rows(x: Tensor) -> set[tuple[float, ...]]:
    return {tuple(row.tolist()) for row in x}


def fit(x: Tensor, batch: int = 37, **arguments: object) -> NominalSet:
    nominal = NominalSet(**arguments)  # type: ignore[arg-type]
    for part in x.split(batch):
        nominal.update(part)
    return nominal.finalize()


def test_k_center_without_projection_is_farthest_first() -> None:
    x = torch.randint(-20, 20, (300, 6)).float()
    nominal = fit(x, n_centroids=40, projection=None)
    _, radius = reference.farthest_first(x.double(), 40)
    assert nominal.centroids_.shape == (40, 6)
    assert rows(nominal.centroids_) <= rows(x)
    assert nominal.radius_ == pytest.approx(float(radius[-1]), rel=1e-4)


def test_projection_keeps_the_covering() -> None:
    """The covering radius in full space is near that of exact k-center, and far below random."""
    torch.manual_seed(3)
    x = torch.randn(4000, 20) @ torch.randn(20, 200)
    exact = fit(x, n_centroids=200, projection=None)
    projected = fit(x, n_centroids=200, projection=64)

    def covering(centroids: Tensor) -> float:
        return float(torch.cdist(x, centroids).min(1).values.max())

    assert covering(projected.centroids_) < 1.25 * covering(exact.centroids_)


def test_fraction_and_few_embeddings() -> None:
    x = torch.randn(200, 5)
    assert len(fit(x, n_centroids=0.1).centroids_) == 20
    few = fit(x[:7], n_centroids=100)
    assert torch.equal(few.centroids_, x[:7])
    assert few.radius_ == 0


def test_bank_is_bounded_and_composition_covers() -> None:
    x = torch.randn(2000, 4)
    bank_bytes = 500 * 4 * 4
    nominal = NominalSet(n_centroids=50, projection=None, bank_bytes=bank_bytes)
    for part in x.split(64):
        nominal.update(part)
        assert sum(p.nbytes for p in nominal._bank) <= bank_bytes
    nominal.finalize()
    covering = torch.cdist(x, nominal.centroids_).min(1).values.max()
    exact = fit(x, n_centroids=50, projection=None).radius_
    assert covering <= 3 * exact  # the proof gives a constant; in practice it is near 1
    assert len(nominal.centroids_) == 50


def test_one_update_larger_than_the_bank() -> None:
    nominal = NominalSet(n_centroids=10, bank_bytes=100 * 4 * 4).update(torch.randn(1000, 4))
    assert len(nominal.finalize().centroids_) == 10


@pytest.mark.parametrize("projection", [None, 8])
def test_merging_is_composing(projection: int | None) -> None:
    """Sets fitted apart and merged equal one whose bank was full between the parts."""
    a, b = torch.randn(300, 16), torch.randn(280, 16)
    arguments = {"n_centroids": 40, "projection": projection}
    merged = NominalSet(**arguments).update(a).merge(NominalSet(**arguments).update(b)).finalize()
    whole = NominalSet(**arguments, bank_bytes=300 * 16 * 4).update(a).update(b).compose()
    assert torch.equal(merged.centroids_, whole.finalize().centroids_)
    assert merged.n_seen == 580


def test_reproducible_for_any_batches() -> None:
    x = torch.randn(900, 30)
    first = fit(x, batch=37, n_centroids=50, projection=16, seed=4)
    again = fit(x, batch=900, n_centroids=50, projection=16, seed=4)
    other = fit(x, n_centroids=50, projection=16, seed=5)
    assert torch.equal(first.centroids_, again.centroids_)
    assert not torch.equal(first.centroids_, other.centroids_)


def inertia(x: Tensor, centroids: Tensor) -> float:
    return float(torch.cdist(x, centroids).min(1).values.square().sum())


@pytest.mark.parametrize("with_faiss", [True, False])
def test_k_means(with_faiss: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if with_faiss:
        pytest.importorskip("faiss")
    else:
        monkeypatch.setitem(sys.modules, "faiss", None)
    centres = torch.randn(8, 6) * 20
    x = (centres[:, None] + torch.randn(8, 100, 6)).flatten(0, 1)
    arguments = {"method": "kmeans", "n_centroids": 16, "seed": 1}
    nominal, again = fit(x, **arguments), fit(x, **arguments)
    assert torch.equal(nominal.centroids_, again.centroids_)
    random = inertia(x, x[torch.randperm(800)[:16]])
    assert inertia(x, nominal.centroids_) < 0.8 * random


def test_empty_clusters_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    x = torch.cat([torch.zeros(500, 2), torch.tensor([[9.0, 9.0], [-9.0, 4.0], [5.0, -9.0]])])
    nominal = fit(x, method="kmeans", n_centroids=4, seed=0)
    assert inertia(x, nominal.centroids_) == pytest.approx(0, abs=1e-8)


def test_distance_has_the_shape_of_its_input() -> None:
    nominal = fit(torch.randn(50, 7), n_centroids=10)
    x = torch.randn(2, 3, 4, 7)
    distance = nominal.distance(x)
    expected = torch.cdist(x.reshape(-1, 7), nominal.centroids_).min(1).values.reshape(2, 3, 4)
    torch.testing.assert_close(distance, expected, rtol=1e-4, atol=1e-4)


def test_progress_counts_centres() -> None:
    done: list[int] = []
    NominalSet(n_centroids=30).update(torch.randn(400, 5)).finalize(done.append)
    assert sum(done) == 30


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "random"}, "method must be one of"),
        ({"n_centroids": 0}, "n_centroids must be a whole number"),
        ({"n_centroids": 2.5}, "n_centroids must be a whole number"),
        ({"projection": 0}, "projection must be at least 1"),
        ({"bank_bytes": 0}, "bank_bytes must be positive"),
    ],
)
def test_rejects(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NominalSet(**arguments)  # type: ignore[arg-type]


def test_nothing_to_choose_from() -> None:
    with pytest.raises(ValueError, match="no embeddings"):
        NominalSet().finalize()
