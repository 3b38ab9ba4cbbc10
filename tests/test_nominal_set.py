"""The nominal set: bank, composition, merging, k-center and k-means."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from torch import Tensor

from npad import NPad, ops
from npad.nominal_methods import METHODS, Method
from npad.statistics.k_center import _projected
from npad.statistics.nominal_set import NominalSet


def embeddings(n: int, channels: int = 12, seed: int = 0) -> Tensor:
    """Twenty clusters of very different size, as nominal patches have."""
    generator = torch.Generator().manual_seed(seed)
    centres = 3 * torch.randn(20, channels, generator=generator)
    weights = 0.7 ** torch.arange(20.0)
    cluster = torch.multinomial(weights, n, replacement=True, generator=generator)
    return centres[cluster] + torch.randn(n, channels, generator=generator)


def covering_radius(x: Tensor, centroids: Tensor) -> float:
    return float(torch.cdist(x.double(), centroids.double()).min(1).values.max())


def test_k_center_of_the_embeddings_themselves() -> None:
    x = embeddings(2000).reshape(4, 25, 20, 12)
    nominal = NominalSet(n_centroids=100).update(x[:1]).update(x[1:]).finalize()
    index, radius = ops.farthest_first(x.reshape(-1, 12), 100)
    assert torch.equal(nominal.centroids_, x.reshape(-1, 12)[index])
    assert nominal.radius_ == float(radius[-1])
    assert nominal.n_seen == 2000


@pytest.mark.parametrize("projection", [1, 8, 40, 99])
def test_projection(projection: int) -> None:
    """Centroids are embeddings, whatever the space they were chosen in."""
    x = embeddings(1500, 40)
    nominal = NominalSet(n_centroids=80, projection=projection).update(x).finalize()
    assert len(nominal.centroids_.unique(dim=0)) == 80
    assert (nominal.distance(nominal.centroids_) == 0).all()
    assert covering_radius(nominal.centroids_, x) < 1e-6  # every centroid is an embedding
    if projection >= 40:
        exact = NominalSet(n_centroids=80).update(x).finalize()
        assert torch.equal(nominal.centroids_, exact.centroids_)


def test_projection_keeps_distances_on_average() -> None:
    x = torch.randn(500, 200)
    projected = _projected(x, 50, seed=0)
    ratio = projected.square().sum(1) / x.square().sum(1)
    assert projected.shape == (500, 50)
    assert abs(float(ratio.mean()) - 1) < 0.05


def test_distance() -> None:
    x = embeddings(300)
    nominal = NominalSet(n_centroids=20).update(x).finalize()
    queries = torch.randn(2, 3, 4, 12)
    distance = nominal.distance(queries)
    expected = torch.cdist(queries.double(), nominal.centroids_.double()).amin(-1)
    assert distance.shape == (2, 3, 4)
    torch.testing.assert_close(distance.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_fraction_counts_all_embeddings_seen(method: str) -> None:
    x = embeddings(1000)
    bank = 300 * 4 * 12
    nominal = NominalSet(method, 0.05, bank_bytes=bank)
    for part in x.split(60):
        nominal.update(part)
    assert len(nominal.finalize().centroids_) == 50
    assert len(NominalSet(method, 1e-9).update(x).finalize().centroids_) == 1


@pytest.mark.parametrize("method", METHODS)
def test_fewer_embeddings_than_centroids_are_all_kept(method: str) -> None:
    x = embeddings(50)
    nominal = NominalSet(method, 51).update(x).finalize()
    assert torch.equal(nominal.centroids_, x)
    assert nominal.radius_ == 0


@given(sizes=st.lists(st.integers(0, 90), min_size=1, max_size=12), rows=st.integers(1, 200))
@settings(max_examples=40, deadline=None)
def test_the_bank_stays_in_its_bounds(sizes: list[int], rows: int) -> None:
    nominal = NominalSet(n_centroids=5, bank_bytes=rows * 4 * 3)
    for i, size in enumerate(sizes):
        nominal.update(torch.randn(size, 3))
        assert sum(map(len, nominal._bank)) == nominal._banked <= rows
        assert sum(map(len, nominal._composed)) <= max(rows, 5) + 5 * 90, i
    assert nominal.n_seen == sum(sizes)
    if sum(sizes):
        assert len(nominal.finalize().centroids_) == min(5, sum(sizes))


def test_centres_of_many_parts_are_composed_again() -> None:
    nominal = NominalSet(n_centroids=10, bank_bytes=35 * 4 * 3)
    for _ in range(100):
        nominal.update(torch.randn(20, 3))
        assert sum(map(len, nominal._composed)) <= 35 + 10


def test_composition_covers_within_four_radii() -> None:
    """Against a lower bound of the best radius: half of what greedy k-center reaches on all."""
    x = embeddings(4000)
    whole = NominalSet(n_centroids=60).update(x).finalize()
    composed = NominalSet(n_centroids=60, bank_bytes=500 * 4 * 12)
    for part in x.split(100):
        composed.update(part)
    composed.finalize()
    assert covering_radius(x, composed.centroids_) <= 4 * whole.radius_
    assert covering_radius(x, composed.centroids_) <= 1.5 * whole.radius_  # in practice


@pytest.mark.parametrize("rows", [100, 350, 4000])
@pytest.mark.parametrize("n_ends", [1, 3])
def test_the_radius_covers_all_that_was_seen(rows: int, n_ends: int) -> None:
    """However often it was composed, merged and finalized; it is exact where nothing was composed."""
    x = embeddings(4000)
    sets = [NominalSet(n_centroids=60, bank_bytes=rows * 4 * 12) for _ in range(2)]
    for part in x.split(90):
        sets[0].update(part)
    for part in embeddings(900, seed=1).split(900 // n_ends):
        sets[1].update(part).finalize()
    merged = sets[0].copy().merge(sets[1]).finalize()
    everything = torch.cat([x, embeddings(900, seed=1)])
    covers = covering_radius(everything, merged.centroids_)
    assert covers <= merged.radius_ * (1 + 1e-5)
    whole = NominalSet(n_centroids=60).update(everything).finalize()
    assert covering_radius(everything, whole.centroids_) == pytest.approx(whole.radius_, rel=1e-5)
    alone = sets[0].finalize()
    assert covering_radius(x, alone.centroids_) <= alone.radius_ * (1 + 1e-5)


def test_a_copy_goes_on_by_itself() -> None:
    nominal = NominalSet(n_centroids=20).update(embeddings(300))
    copy = nominal.copy().update(embeddings(300, seed=1)).finalize()
    assert (nominal.n_seen, copy.n_seen) == (300, 600)
    alone = NominalSet(n_centroids=20).update(embeddings(300)).finalize()
    assert torch.equal(nominal.finalize().centroids_, alone.centroids_)


@pytest.mark.parametrize("method", METHODS)
def test_what_was_finalized_is_so_after_it_was_written_down(method: str) -> None:
    nominal = NominalSet(method, 20).update(embeddings(300)).finalize()
    again = NominalSet(method, 20)
    again.restore(*nominal.state())
    assert again.finalize().centroids_ is nominal.centroids_
    assert again.radius_ == nominal.radius_ or method == "kmeans"
    more = embeddings(50, seed=1)
    found, expected = (one.update(more).finalize() for one in (again, nominal))
    assert torch.equal(found.centroids_, expected.centroids_)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n_centroids", [40, 0.1])
def test_merging_is_a_bank_that_is_full_between(method: str, n_centroids: float) -> None:
    a, b = embeddings(400, seed=1), embeddings(400, seed=2)
    arguments = {"n_centroids": n_centroids, "bank_bytes": 400 * 4 * 12, "seed": 3}

    def fit(*parts: Tensor) -> NominalSet:
        nominal = NominalSet(method, **arguments)
        for part in parts:
            for batch in part.split(64):
                nominal.update(batch)
        return nominal

    merged = fit(a).merge(fit(b)).finalize()
    whole = fit(a, b).finalize()
    assert torch.equal(merged.centroids_, whole.centroids_)
    assert merged.radius_ == whole.radius_ or method == "kmeans"
    assert merged.n_seen == whole.n_seen == 800


def test_merging_takes_the_k_center_of_both_parts_centres() -> None:
    a, b = embeddings(300, seed=1), embeddings(500, seed=2)
    parts = [x[ops.farthest_first(x, 30)[0]] for x in (a, b)]
    union = torch.cat(parts)
    index, _ = ops.farthest_first(union, 30)
    merged = NominalSet(n_centroids=30).update(a).merge(NominalSet(n_centroids=30).update(b))
    assert torch.equal(merged.finalize().centroids_, union[index])


def test_merging_with_an_empty_set_changes_nothing() -> None:
    x = embeddings(200)
    alone = NominalSet(n_centroids=30).update(x).finalize()
    left = NominalSet(n_centroids=30).merge(NominalSet(n_centroids=30).update(x)).finalize()
    right = NominalSet(n_centroids=30).update(x).merge(NominalSet(n_centroids=30)).finalize()
    # k-center of the k-center: the same centroids, in the same order
    assert torch.equal(left.centroids_, alone.centroids_)
    assert torch.equal(right.centroids_, alone.centroids_)


def test_update_after_finalize() -> None:
    a, b = embeddings(300, seed=1), embeddings(300, seed=2)
    nominal = NominalSet(n_centroids=30).update(a).finalize()
    first, radius = nominal.centroids_, nominal.radius_
    assert nominal.finalize().centroids_ is first  # nothing new
    assert nominal.radius_ == radius
    nominal.update(b).finalize()
    merged = NominalSet(n_centroids=30).update(a).merge(NominalSet(n_centroids=30).update(b))
    assert torch.equal(nominal.centroids_, merged.finalize().centroids_)


@pytest.mark.parametrize("method", METHODS)
def test_a_rerun_is_bitwise_equal(method: str) -> None:
    x = embeddings(3000)
    first, again = (
        NominalSet(method, 50, projection=6, seed=5).update(x).finalize().centroids_
        for _ in range(2)
    )
    assert torch.equal(first, again)


def test_k_means_finds_separate_clusters() -> None:
    centres = 50 * torch.eye(8)
    x = (centres[:, None] + torch.randn(8, 200, 8)).reshape(-1, 8)
    best = min(
        (NominalSet("kmeans", 8, seed=seed).update(x).finalize() for seed in range(10)),
        key=lambda nominal: float(nominal.distance(x).square().sum()),
    )
    means = x.reshape(8, 200, 8).mean(1)
    distance, index = ops.nearest_centroid(means, best.centroids_)
    assert index.sort().values.tolist() == list(range(8))
    assert distance.max() < 1e-3
    assert torch.isnan(torch.tensor(best.radius_))


def test_k_means_with_duplicates_and_empty_clusters() -> None:
    """More centroids than distinct points: every one is finite and every point has one near."""
    x = torch.arange(6.0).repeat(100)[:, None].repeat(1, 4)
    nominal = NominalSet("kmeans", 20).update(x).finalize()
    assert nominal.centroids_.shape == (20, 4)
    assert nominal.centroids_.isfinite().all()
    assert float(nominal.distance(x).max()) < 0.1


def test_k_means_is_as_good_as_scikit_learn() -> None:
    x = embeddings(3000)
    ours = (NominalSet("kmeans", 40, seed=i).update(x).finalize() for i in range(5))
    theirs = (KMeans(40, n_init=1, random_state=i).fit(x.numpy()) for i in range(5))
    total = sum(float(nominal.distance(x).square().sum()) for nominal in ours)
    assert total < 1.1 * sum(k_means.inertia_ for k_means in theirs)


def test_k_means_looks_at_a_seeded_sample() -> None:
    x = embeddings(600)
    first, other = (
        NominalSet("kmeans", 1, seed=seed).update(x).finalize().centroids_ for seed in (0, 1)
    )
    sample = x[torch.randperm(600, generator=torch.Generator().manual_seed(0))[:256]]
    torch.testing.assert_close(first[0], sample.mean(0), rtol=1e-4, atol=1e-4)
    assert not torch.equal(first, other)


def test_without_faiss_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)  # import raises ImportError
    monkeypatch.delitem(sys.modules, "npad.statistics.k_means", raising=False)
    model = NPad("no such backbone", nominal_set="kmeans")  # which would be looked for after that
    for make in (
        METHODS["kmeans"].load,
        lambda: NominalSet("kmeans"),
        lambda: model.fit("nowhere"),
    ):
        with pytest.raises(
            ImportError, match=r"nominal_set='kmeans' needs .*faiss.* pip install \"npad\[faiss\]\""
        ):
            make()
    NominalSet("kcenter")


def test_a_method_is_a_line_in_the_registry(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "first_points.py").write_text(
        "def first_points(points, n, *, seed, projection, advance):\n    return points[:n], 2.5\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(
        METHODS, "first", Method("the first points", "first_points:first_points", lambda *_: 0)
    )
    x = embeddings(50)
    nominal = NominalSet("first", 10).update(x).finalize()
    assert torch.equal(nominal.centroids_, x[:10])
    assert nominal.radius_ == 2.5


def test_the_registry_imports_no_library() -> None:
    code = "import sys, npad.nominal_methods; print({'torch', 'faiss'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


@pytest.mark.parametrize("method", METHODS)
def test_progress_adds_up(method: str) -> None:
    counts: list[int] = []
    NominalSet(method, 200).update(embeddings(3000)).finalize(counts.append)
    assert sum(counts) == 200
    assert min(counts) >= 0


def test_update_copies() -> None:
    x = embeddings(100)
    nominal = NominalSet(n_centroids=10).update(x)
    expected = NominalSet(n_centroids=10).update(x.clone()).finalize().centroids_
    x.zero_()
    assert torch.equal(nominal.finalize().centroids_, expected)


def test_half_precision_embeddings_are_held_in_float32() -> None:
    x = embeddings(100).half()
    assert torch.equal(
        NominalSet(n_centroids=10).update(x).finalize().centroids_,
        NominalSet(n_centroids=10).update(x.float()).finalize().centroids_,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "dbscan"}, "method must be one of 'kcenter', 'kmeans', got 'dbscan'"),
        ({"n_centroids": 0}, "n_centroids must be a whole number of at least 1 or a fraction"),
        ({"n_centroids": 2.5}, "got 2.5"),
        ({"n_centroids": -0.1}, "got -0.1"),
        ({"projection": 0}, "projection must be at least 1 or None, got 0"),
        ({"bank_bytes": 0}, "bank_bytes must be positive, got 0"),
    ],
)
def test_rejects_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NominalSet(**arguments)  # type: ignore[arg-type]


def test_an_update_on_a_device_waits_for_nothing() -> None:
    """Values of meta tensors cannot be looked at, any more than those that a GPU has yet to compute."""
    nominal = NominalSet()
    for _ in range(4):
        nominal.update(torch.empty(3, 12, device="meta"))
    assert nominal.n_seen == 12


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.update(torch.randn(3, 5)), "update: 5 channels, but .* so far have 12"),
        (lambda s: s.update(torch.tensor(1.0)), r"update: x must have shape \(..., C\), got \(\)"),
        (lambda s: s.update(torch.full((2, 12), torch.nan)), "x holds NaN or infinite values"),
        (lambda s: NominalSet().finalize(), "no embeddings; call update first"),
        (lambda s: s.merge(NominalSet("kmeans")), "method is 'kcenter' here and 'kmeans' in other"),
        (lambda s: s.merge(NominalSet(seed=1)), "seed is 0 here and 1 in other"),
        (lambda s: s.merge(NominalSet().update(torch.randn(2, 4))), "merge: 4 channels"),
    ],
)
def test_rejects_input(call: Callable[[NominalSet], object], message: str) -> None:
    nominal = NominalSet().update(embeddings(20))
    with pytest.raises(ValueError, match=message):
        call(nominal)
    assert nominal.n_seen == 20  # as it was
