"""Fit: what it leaves does not depend on how the images came, were split, or were interrupted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from npad import NPad
from npad.features.projection import principal_axes
from npad.fitting import AXES_IMAGES, Fit
from npad.learned import Learned
from npad.members import Member
from npad.model_file import read_model, write_model
from npad.settings import Settings
from npad.statistics.holdout import MAX_HELD_OUT, Reservoir

GRID, CHANNELS = (3, 4), 10
GAUSSIAN = ("projection", "mean", "factor")


def embeddings(n: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(CHANNELS, CHANNELS, generator=generator)
    return torch.randn(n, *GRID, CHANNELS, generator=generator) @ mixing


def settings(**arguments: object) -> Settings:
    defaults = {"backbone": "filterbank", "n_centroids": 15, "factor_dtype": "float32"}
    return Settings(**{**defaults, "progress": False, **arguments})  # type: ignore[arg-type]


def new(**arguments: object) -> Fit:
    """A fit of two members: of all that is tried here, the second with the first channels alone."""
    chosen = settings(**arguments)
    members = (member.used_by(chosen.fusion) for member in (Member(0, (2, 3)), Member(1, (2,))))
    return Fit(chosen, [member for member in members if member is not None])


def views(x: Tensor) -> list[Tensor]:
    """The embeddings of both."""
    return [x, x[:, ::2, ::2, :5]]


def fitted(x: Tensor, batch: int = 7, **arguments: object) -> Learned:
    fit = new(**arguments)
    for part in x.split(batch):
        fit.update(embeddings=views(part))
    return fit.finalize()


def assert_equal(a: Learned, b: Learned) -> None:
    assert a.to_json() == b.to_json()
    assert a.tensors().keys() == b.tensors().keys()
    for name, tensor in a.tensors().items():
        assert torch.equal(tensor, b.tensors()[name]), name


CASES = [
    {},
    {"fusion": "sum", "holdout": 0.3},
    {"fusion": "mahalanobis", "eps": 0.01, "window": 1},
    {"fusion": "euclidean", "n_centroids": 0.05},
    {"n_features": 4},
    {"n_features": 4, "reduction": "random", "factor_dtype": "bfloat16"},
    {"nominal_set": None},
]


def test_it_is_what_npad_fits() -> None:
    images = np.random.default_rng(0).integers(0, 255, (9, 32, 32, 3), dtype=np.uint8)
    model = NPad("filterbank", image_size=32, n_centroids=15, progress=False, batch_size=4)
    x = model.embed(images)
    assert x.shape == (9, 8, 8, 51)
    model.set_params(gaussians="joint")
    fit = Fit(Settings(**model.get_params()), [Member(0, (1, 2, 3))])
    for part in x.split(4):
        fit.update(embeddings=[part])
    (learned,), (own,) = fit.finalize().members, model.fit(images).members_
    for name, tensor in learned.tensors().items():
        assert torch.equal(tensor, getattr(own, name)), name
    assert learned.to_json() == own.to_json()
    assert model.nbytes == sum(tensor.nbytes for tensor in learned.tensors().values())


@pytest.mark.parametrize("arguments", CASES)
def test_what_is_learned_has_the_shapes_that_are_said(arguments: dict[str, object]) -> None:
    learned = fitted(embeddings(70), **arguments)
    for member, grid, channels in zip(learned.members, (GRID, (2, 2)), (CHANNELS, 5), strict=True):
        assert (member.grid, member.channels) == (grid, channels)
        expected = member.expected(settings(**arguments), member.n_centroids or 0)
        found = {name: (x.dtype, tuple(x.shape)) for name, x in member.tensors().items()}
        assert found == expected


@pytest.fixture
def small_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a Gaussian of ten channels were large."""
    monkeypatch.setattr("npad.member_fit.MOST_FEATURES", 2)


def gaussian_fit(x: Tensor, **arguments: object) -> Fit:
    """A Gaussian of its own, as each layer has."""
    fit = Fit(settings(**arguments), [Member(0, (2,), own_grid=True, nominal_set=False)])
    for part in x.split(7):
        fit.update(embeddings=[part])
    return fit


@pytest.mark.usefixtures("small_most")
@pytest.mark.parametrize("fusion", ["product", "sum"])
def test_large_gaussians_are_reduced_at_the_end(fusion: str) -> None:
    """As one of embeddings that were reduced before, by the axes of all of them."""
    x, arguments = embeddings(60), {"fusion": fusion, "holdout": 0.3}
    learned = gaussian_fit(x, **arguments).finalize()
    (member,) = learned.members
    assert member.projection is not None
    assert (member.n_features, member.channels) == (2, CHANNELS)
    found = {name: (t.dtype, tuple(t.shape)) for name, t in member.tensors().items()}
    assert found == member.expected(settings(), 0)
    axes = principal_axes([x], 2)
    cosines = (member.projection * axes).sum(0).abs()
    torch.testing.assert_close(cosines, torch.ones(2), rtol=0, atol=1e-4)
    reduced = gaussian_fit(x @ member.projection, **arguments, n_features=None).finalize()
    (same,) = reduced.members
    assert member.window == same.window
    torch.testing.assert_close(member.mean, same.mean, rtol=1e-3, atol=1e-4)
    for kind, moments in (learned.standardization or {}).items():
        assert reduced.standardization is not None
        assert moments.mean == pytest.approx(reduced.standardization[kind].mean, rel=0.1)


@pytest.mark.usefixtures("small_most")
def test_reduced_gaussians_of_parts_that_merge_are_those_of_the_whole() -> None:
    """Axes and all: none was chosen before."""
    x, arguments = embeddings(90), {"eps": 0.01, "window": 3, "holdout": 0.3}
    (whole,) = gaussian_fit(x, **arguments).finalize().members
    first, second = (gaussian_fit(part, **arguments) for part in x.split([31, 59]))
    first.finalize()  # which holds out no longer
    (merged,) = first.merge(second).finalize().members
    sign = (whole.projection * merged.projection).sum(0).sign()
    torch.testing.assert_close(merged.projection * sign, whole.projection, rtol=0, atol=1e-4)
    torch.testing.assert_close(merged.mean * sign, whole.mean, rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("small_most")
def test_who_shares_the_embedding_keeps_all_of_it() -> None:
    for member in new().update(embeddings=views(embeddings(20))).finalize().members:
        assert member.n_features is None
        assert member.projection is None


@pytest.mark.parametrize("arguments", CASES)
@pytest.mark.parametrize("stop", [1, 20, 63, 64, 90])
def test_a_fit_that_is_written_down_goes_on_as_if_it_had_not_stopped(
    arguments: dict[str, object], stop: int, tmp_path: Path
) -> None:
    x = embeddings(100)
    fit = new(**arguments)
    for part in x[:stop].split(7):
        fit.update(embeddings=views(part))
    values, tensors = fit.state()
    write_model(tmp_path / "state", json.loads(json.dumps(values)), tensors)
    again = Fit.from_state(*read_model(tmp_path / "state"))
    for other in (fit, again):
        for part in x[stop:].split(7):
            other.update(embeddings=views(part))
    assert_equal(fit.finalize(), again.finalize())


@pytest.mark.parametrize("n_parts", [2, 5])
@pytest.mark.parametrize(
    "arguments",
    [
        {"eps": 0.01, "window": 3, "holdout": 0.3},
        {"eps": 0.01, "window": 3, "n_features": 4},
    ],
)
def test_merged_parts_are_the_whole(arguments: dict[str, object], n_parts: int) -> None:
    """The Gaussians to rounding, whatever was held out where; the nominal set covers all."""
    x = embeddings(120)
    parts = []
    for part in [x, *x.tensor_split(n_parts)]:
        fit = new(**arguments)
        fit.choose_axes([views(x)])
        parts.append(fit.update(embeddings=views(part)))
    whole, merged, *others = parts
    for part in others:
        merged.merge(part)
    found, expected = merged.finalize(), whole.finalize()
    assert found.n_images == expected.n_images == 120
    for a, b in zip(found.members, expected.members, strict=True):
        torch.testing.assert_close(a.mean, b.mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(a.factor, b.factor, rtol=1e-3, atol=1e-4)
        assert a.n_centroids == b.n_centroids


def test_parts_that_wait_for_axes_merge() -> None:
    """None has enough images to choose; together they have."""
    x = embeddings(90)
    parts = [new(n_features=4).update(embeddings=views(p)) for p in x.split(30)]
    merged = parts[0].merge(parts[1])
    assert [member.projection for member in merged.members] == [None, None]
    merged.merge(parts[2])
    for i, member in enumerate(merged.members):
        expected = principal_axes([views(part)[i] for part in x.split(30)], 4)
        assert torch.equal(member.projection, expected)
    assert merged.finalize().n_images == 90


def test_one_that_waits_takes_the_axes_of_the_other() -> None:
    x = embeddings(100)
    few, many = (new(n_features=4).update(embeddings=views(p)) for p in (x[:10], x[10:]))
    axes = many.members[0].projection
    assert few.merge(many).members[0].projection is axes
    assert few.finalize().n_images == 100


def test_an_empty_fit_takes_what_the_other_has_chosen() -> None:
    """Images that were held out have been fitted by then: nothing is left to choose on."""
    arguments = {"fusion": "sum", "holdout": 0.3}
    other = new(**arguments).update(embeddings=views(embeddings(60)))
    expected = other.finalize()
    assert_equal(new(**arguments).merge(other).finalize(), expected)


def test_what_does_not_merge() -> None:
    x = embeddings(80)
    fit = new(n_features=4).update(embeddings=views(x))
    before = fit.state()[1]["1.gaussian.scatter"].clone()
    with pytest.raises(ValueError, match="different settings"):
        fit.merge(new(n_features=5))
    with pytest.raises(ValueError, match="different members"):
        fit.merge(Fit(settings(n_features=4), [Member(0, (2, 3))]))
    with pytest.raises(ValueError, match="merged with itself"):
        fit.merge(fit)
    fit.merge(new(n_features=4, device="cuda:1", progress=None))  # the machine's own
    with pytest.raises(ValueError, match="different principal axes"):
        fit.merge(new(n_features=4).update(embeddings=views(embeddings(80, seed=1))))
    with pytest.raises(ValueError, match=r"grid and channels are .*5\) here and .*4\) in other"):
        fit.merge(new(n_features=4).update(embeddings=[x, x[:, ::2, ::2, :4]]))
    assert fit.merge(new(n_features=4)).n_images == 80  # nothing was seen
    assert torch.equal(fit.state()[1]["1.gaussian.scatter"], before)


@pytest.mark.parametrize("arguments", CASES)
@pytest.mark.parametrize("stop", [2, 20, 70])
def test_an_end_changes_nothing(arguments: dict[str, object], stop: int) -> None:
    """But for the nominal set, which is composed there."""
    x = embeddings(100)
    ended, other = new(**arguments), new(**arguments)
    for part in x[:stop].split(7):
        for fit in (ended, other):
            fit.update(embeddings=views(part))
    if stop > 2 or arguments.get("window") != 1:
        assert_equal(ended.finalize(), ended.finalize())
    for part in x[stop:].split(7):
        for fit in (ended, other):
            fit.update(embeddings=views(part))
    found, expected = ended.finalize(), other.finalize()
    for a, b in zip(found.members, expected.members, strict=True):
        assert (a.eps, a.window, a.n_features) == (b.eps, b.window, b.n_features)
        assert a.n_centroids == b.n_centroids
        for name in GAUSSIAN:
            tensors = getattr(a, name), getattr(b, name)
            assert tensors == (None, None) or torch.equal(*tensors), name


@pytest.mark.parametrize("arguments", [*CASES, {"fusion": "sum", "holdout": 0.5}])
@pytest.mark.parametrize("n", [3, 4, 6, 70])
def test_the_last_end_finds_what_any_does(arguments: dict[str, object], n: int) -> None:
    """From few images, too, of which most are held out."""
    for seed in range(4):
        fits = [new(**arguments, seed=seed).update(embeddings=views(embeddings(n))) for _ in "ab"]
        assert_equal(fits[0].finalize(), fits[1].finalize(last=True))


def test_a_copy_goes_on_by_itself() -> None:
    x = embeddings(60)
    fit = new(fusion="sum", holdout=0.3).update(embeddings=views(x[:40]))
    expected = fit.finalize()
    copy = fit.copied(torch.device("cpu"), progress=False)
    copy.update(embeddings=views(x[40:])).finalize()
    assert_equal(fit.finalize(), expected)
    assert (fit.n_images, copy.n_images) == (40, 60)
    assert fit.to(torch.device("cpu")) is fit


def test_a_copy_for_which_there_is_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    fit = new().update(embeddings=views(embeddings(5)))
    monkeypatch.setattr("npad.devices.free_bytes", lambda device: 1000)
    with pytest.raises(MemoryError, match=r"a copy of the statistics.* are free on cpu; fit all"):
        fit.copied(torch.device("cpu"))


def test_a_fit_can_go_on_after_its_end() -> None:
    x = embeddings(60)
    fit = new(eps=0.01, window=3).update(embeddings=views(x[:40]))
    fit.finalize()
    a = fit.update(embeddings=views(x[40:])).finalize()
    b = fitted(x, eps=0.01, window=3)
    assert a.n_images == 60
    torch.testing.assert_close(a.members[0].mean, b.members[0].mean, rtol=1e-4, atol=1e-5)


def test_what_is_refused() -> None:
    x = embeddings(4)
    fit = new().update(embeddings=views(x))
    with pytest.raises(
        ValueError, match=r"must be \(3, 4\) with 10 channels as before, got \(2, 4\)"
    ):
        fit.update(embeddings=views(x[:, :2]))
    with pytest.raises(ValueError, match=r"shape \(B, h, w, D\), got \(3, 4, 10\)"):
        fit.update(embeddings=[x[0], x[0]])
    with pytest.raises(ValueError, match=r"1 image\(s\) given; at least 2"):
        new().update(embeddings=views(x[:1])).finalize()


def test_more_features_than_there_are_channels() -> None:
    images = np.random.default_rng(0).integers(0, 255, (4, 32, 32, 3), dtype=np.uint8)
    model = NPad("filterbank", image_size=32, n_features=52, progress=False)
    with pytest.raises(
        ValueError, match="n_features=52 is more than the 51 channels of filterbank"
    ):
        model.fit(images)
    model.set_params(n_features=20).fit(images)  # of a layer there are 17
    assert [m.n_features for m in model.members_] == [None, None, None, 20]
    assert [m.projection.shape for m in model.members_ if m.n_features] == [(51, 20)]


@pytest.mark.parametrize("batch", [1, 8, 100])
def test_axes_come_from_as_many_images_of_a_stream_as_of_a_folder(batch: int) -> None:
    """Not from as many batches: a camera gives single images."""
    images = np.random.default_rng(0).integers(0, 255, (100, 32, 32, 3), dtype=np.uint8)
    model = NPad("filterbank", image_size=32, n_features=5, n_centroids=9, progress=False)
    stream = (images[i : i + batch] for i in range(0, len(images), batch))
    model.set_params(batch_size=batch).fit(stream)
    first = NPad("filterbank", image_size=32, progress=False).embed(images)
    seen = -(-AXES_IMAGES // batch) * batch
    expected = principal_axes([first[:seen]], 5)
    overlap = (model.members_[-1].projection.T @ expected).abs()
    torch.testing.assert_close(overlap, torch.eye(5), rtol=1e-3, atol=1e-3)


def test_merged_reservoirs_hold_a_uniform_sample() -> None:
    """Every candidate of either part stays as often."""
    counts = np.zeros(400)
    for seed in range(300):
        parts = []
        for first, last in ((0, 100), (100, 400)):
            part = Reservoir(1.0, seed + first)
            part.take(torch.arange(first, last).reshape(-1, 1, 1, 1))
            parts.append(part)
        gone: list[Tensor] = []
        parts[0].merge(parts[1], gone.append)
        kept = torch.stack(parts[0].kept).flatten()
        assert len(kept) == len(kept.unique()) == MAX_HELD_OUT
        assert sum(map(len, gone)) == 2 * MAX_HELD_OUT - MAX_HELD_OUT
        counts[kept] += 1
    share = counts[:100].sum() / counts.sum()
    assert share == pytest.approx(0.25, abs=0.01)


def test_fingerprints_tell_images_whatever_they_are_called(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 255, (5, 24, 32, 3), dtype=np.uint8)
    small = {"image_size": (24, 32), "n_centroids": 8, "progress": False}
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{9 - i}.png")
    from_arrays = NPad("filterbank", batch_size=2, **small).fit(images).fingerprints_
    from_files = NPad("filterbank", **small).fit(tmp_path).fingerprints_
    assert from_files == from_arrays[::-1]
    assert len(set(from_arrays)) == 5
    changed = images.copy()
    changed[3, 5, 7, 1] ^= 1
    others = NPad("filterbank", **small).fit(changed).fingerprints_
    assert [a == b for a, b in zip(from_arrays, others, strict=True)] == [1, 1, 1, 0, 1]


def test_fingerprints_of_parts_come_together() -> None:
    x = torch.rand(4, 3, 8, 8)

    def fit(part: Tensor) -> Fit:
        whole = Fit(settings(), [Member(0, (1,))])
        return whole.update([part.permute(0, 2, 3, 1)], part)

    merged = fit(x[:3]).merge(fit(x[3:]))
    assert merged.fingerprints == fit(x).fingerprints
    assert Fit.from_state(*merged.state()).fingerprints == merged.fingerprints
    assert new().update(embeddings=views(embeddings(3))).fingerprints == []
