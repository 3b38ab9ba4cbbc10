"""Fit: what it leaves does not depend on how the images came, were split, or were interrupted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from npad import NPad, ops
from npad.features.projection import principal_axes
from npad.fitting import AXES_IMAGES, Fit
from npad.learned import Learned
from npad.model_file import read_model, write_model
from npad.settings import Settings
from npad.statistics.holdout import MAX_HELD_OUT, Reservoir

GRID, CHANNELS = (3, 4), 10


def embeddings(n: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(CHANNELS, CHANNELS, generator=generator)
    return torch.randn(n, *GRID, CHANNELS, generator=generator) @ mixing


def settings(**arguments: object) -> Settings:
    defaults = {"backbone": "filterbank", "n_centroids": 15, "factor_dtype": "float32"}
    return Settings(**{**defaults, "progress": False, **arguments})  # type: ignore[arg-type]


def fitted(x: Tensor, batch: int = 7, **arguments: object) -> Learned:
    fit = Fit(settings(**arguments))
    for part in x.split(batch):
        fit.update(embeddings=part)
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
    fit = Fit(Settings(**model.get_params()))
    for part in x.split(4):
        fit.update(embeddings=part)
    learned, model = fit.finalize(), model.fit(images)
    for name, tensor in learned.tensors().items():
        assert torch.equal(tensor, getattr(model, f"{name}_")), name
    assert learned.eps == model.eps_
    assert model.nbytes == learned.nbytes


@pytest.mark.parametrize("arguments", CASES)
def test_what_is_learned_has_the_shapes_that_are_said(arguments: dict[str, object]) -> None:
    learned = fitted(embeddings(70), **arguments)
    s = settings(**arguments)
    c = s.n_features or CHANNELS
    sizes = {"P": 12, "D": CHANNELS, "C": c, "packed": ops.packed_size(c)}
    expected = Learned.expected(s, {**sizes, "K": learned.n_centroids or 0})
    found = {name: (x.dtype, tuple(x.shape)) for name, x in learned.tensors().items()}
    assert found == expected


@pytest.mark.parametrize("arguments", CASES)
@pytest.mark.parametrize("stop", [1, 20, 63, 64, 90])
def test_a_fit_that_is_written_down_goes_on_as_if_it_had_not_stopped(
    arguments: dict[str, object], stop: int, tmp_path: Path
) -> None:
    x = embeddings(100)
    fit = Fit(settings(**arguments))
    for part in x[:stop].split(7):
        fit.update(embeddings=part)
    values, tensors = fit.state()
    write_model(tmp_path / "state", json.loads(json.dumps(values)), tensors)
    again = Fit.from_state(*read_model(tmp_path / "state"))
    for other in (fit, again):
        for part in x[stop:].split(7):
            other.update(embeddings=part)
    assert_equal(fit.finalize(), again.finalize())


@pytest.mark.parametrize("n_parts", [2, 5])
@pytest.mark.parametrize(
    "arguments", [{"eps": 0.01, "holdout": 0.3}, {"eps": 0.01, "n_features": 4}]
)
def test_merged_parts_are_the_whole(arguments: dict[str, object], n_parts: int) -> None:
    """The Gaussians to rounding, whatever was held out where; the nominal set covers all."""
    x = embeddings(120)
    axes = Fit(settings(**arguments))
    axes.choose_axes([x])
    parts = []
    for part in x.tensor_split(n_parts):
        fit = Fit(settings(**arguments))
        fit.projection = axes.projection
        parts.append(fit.update(embeddings=part))
    merged = parts[0]
    for part in parts[1:]:
        merged.merge(part)
    whole = Fit(settings(**arguments))
    whole.projection = axes.projection
    a, b = merged.finalize(), whole.update(embeddings=x).finalize()
    assert a.n_images == b.n_images == 120
    torch.testing.assert_close(a.mean, b.mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(a.factor, b.factor, rtol=1e-3, atol=1e-4)
    assert a.n_centroids == b.n_centroids


def test_parts_that_wait_for_axes_merge() -> None:
    """None has enough images to choose; together they have."""
    x = embeddings(90)
    parts = [Fit(settings(n_features=4)).update(embeddings=p) for p in x.split(30)]
    merged = parts[0].merge(parts[1])
    assert merged.projection is None
    merged.merge(parts[2])
    assert torch.equal(merged.projection, principal_axes(x.split(30), 4))
    assert merged.finalize().n_images == 90


def test_one_that_waits_takes_the_axes_of_the_other() -> None:
    x = embeddings(100)
    few, many = (Fit(settings(n_features=4)).update(embeddings=p) for p in (x[:10], x[10:]))
    axes = many.projection
    assert few.merge(many).projection is axes
    assert few.finalize().n_images == 100


def test_an_empty_fit_takes_what_the_other_has_chosen() -> None:
    """Images that were held out have been fitted by then: nothing is left to choose on."""
    arguments = {"fusion": "sum", "holdout": 0.3}
    other = Fit(settings(**arguments)).update(embeddings=embeddings(60))
    expected = other.finalize()
    assert_equal(Fit(settings(**arguments)).merge(other).finalize(), expected)


def test_what_does_not_merge() -> None:
    x = embeddings(80)
    fit = Fit(settings(n_features=4)).update(embeddings=x)
    with pytest.raises(ValueError, match="different settings"):
        fit.merge(Fit(settings(n_features=5)))
    with pytest.raises(ValueError, match="merged with itself"):
        fit.merge(fit)
    fit.merge(Fit(settings(n_features=4, device="cuda:1", progress=None)))  # the machine's own
    with pytest.raises(ValueError, match="different axes"):
        fit.merge(Fit(settings(n_features=4)).update(embeddings=embeddings(80, seed=1)))
    with pytest.raises(ValueError, match=r"grid and channels are .*10\) here and .*7\) in other"):
        fit.merge(Fit(settings(n_features=4)).update(embeddings=x[..., :7]))
    assert fit.merge(Fit(settings(n_features=4))).n_images == 80  # nothing was seen


def test_a_fit_can_go_on_after_its_end() -> None:
    x = embeddings(60)
    fit = Fit(settings(eps=0.01)).update(embeddings=x[:40])
    fit.finalize()
    a = fit.update(embeddings=x[40:]).finalize()
    b = fitted(x, eps=0.01)
    assert a.n_images == 60
    torch.testing.assert_close(a.mean, b.mean, rtol=1e-4, atol=1e-5)


def test_what_is_refused() -> None:
    x = embeddings(4)
    fit = Fit(settings()).update(embeddings=x)
    with pytest.raises(TypeError, match="images or embeddings, one of them"):
        fit.update()
    with pytest.raises(TypeError, match="made without embed="):
        fit.update(torch.zeros(2, 3, 8, 8))
    with pytest.raises(
        ValueError, match=r"must be \(3, 4\) with 10 channels as before, got \(2, 4\)"
    ):
        fit.update(embeddings=x[:, :2])
    with pytest.raises(ValueError, match=r"shape \(B, h, w, D\), got \(3, 4, 10\)"):
        fit.update(embeddings=x[0])
    with pytest.raises(ValueError, match="n_features=11 is more than the 10 channels"):
        Fit(settings(n_features=11)).update(embeddings=x)
    with pytest.raises(ValueError, match=r"1 image\(s\) given; at least 2"):
        Fit(settings()).update(embeddings=x[:1]).finalize()


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
    overlap = (model.projection_.T @ expected).abs()
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
