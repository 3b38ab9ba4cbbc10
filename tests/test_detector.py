"""NPad: fit, predict, save, load; on the filter bank, and on real images where they are at hand."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from npad import NPad
from npad.evaluation.datasets import find_categories
from npad.evaluation.measure import evaluate, score
from npad.evaluation.synthetic import make_dataset
from npad.model_file import ModelFileError, read_model, write_model
from npad.settings import MOST_FEATURES

SMALL = {"image_size": 64, "n_centroids": 200, "progress": False}


@pytest.fixture(scope="module")
def cloth(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cloth") / "woven"
    return make_dataset(root, seed=1, n_train=12, n_test_good=3, n_defective=4)


@pytest.fixture(scope="module")
def model(cloth: Path) -> NPad:
    return NPad("filterbank", **SMALL).fit(cloth / "train/good")


def assert_equal_models(a: NPad, b: NPad) -> None:
    assert a.n_images_ == b.n_images_
    for own, other in zip(a.members_, b.members_, strict=True):
        assert own.to_json() == other.to_json()
        assert own.tensors().keys() == other.tensors().keys()
        for name, tensor in own.tensors().items():
            assert torch.equal(tensor, other.tensors()[name]), name


def test_maps_have_the_size_of_their_images(model: NPad, cloth: Path, tmp_path: Path) -> None:
    pixels = np.asarray(Image.open(next((cloth / "test/good").iterdir())).convert("RGB"))
    Image.fromarray(pixels[:101, :57]).save(tmp_path / "odd.png")
    result = model.predict(tmp_path)
    assert result.maps[0].shape == (101, 57)
    assert result.maps[0].dtype == np.float32
    assert result.paths == [str(tmp_path / "odd.png")]
    assert result.scores.dtype == np.float64


def test_defects_score_higher_and_are_found_where_they_are(model: NPad, cloth: Path) -> None:
    good = model.predict(cloth / "test/good").scores
    spoiled = []
    for path in sorted((cloth / "test/good").iterdir()):
        pixels = np.array(Image.open(path).convert("RGB"))
        height, width = pixels.shape[:2]
        top, left = height // 4, 5 * width // 8
        pixels[top : top + height // 8, left : left + width // 8] = 255
        spoiled.append(pixels)
    result = model.predict(np.stack(spoiled))
    assert result.scores.min() > good.max()
    for map_ in result.maps:
        y, x = np.unravel_index(map_.argmax(), map_.shape)
        assert top - 8 <= y <= top + height // 8 + 8
        assert left - 8 <= x <= left + width // 8 + 8


def test_same_input_gives_a_bitwise_equal_model(model: NPad, cloth: Path, tmp_path: Path) -> None:
    again = NPad("filterbank", **SMALL).fit(cloth / "train/good")
    assert_equal_models(model, again)
    model.save(tmp_path / "a.npad")
    again.save(tmp_path / "b.npad")
    assert (tmp_path / "a.npad").read_bytes() == (tmp_path / "b.npad").read_bytes()


def test_every_kind_of_source_gives_the_same_scores(model: NPad, cloth: Path) -> None:
    folder = cloth / "test/good"
    paths = sorted(folder.iterdir())
    arrays = np.stack([np.asarray(Image.open(p).convert("RGB")) for p in paths])
    tensor = torch.from_numpy(arrays).permute(0, 3, 1, 2)
    expected = model.predict(folder).scores
    for source in (paths, [str(p) for p in paths], arrays, tensor):
        np.testing.assert_allclose(model.predict(source).scores, expected, rtol=1e-5)
    # Float input is resized in float, so it agrees only as well as rounding to 8 bits allows.
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(tensor.float() / 255, torch.zeros(len(paths))), batch_size=2
    )
    np.testing.assert_allclose(model.predict(loader).scores, expected, rtol=2e-2)
    assert model.predict(arrays).paths == ["image[0]", "image[1]", "image[2]"]


def test_a_stream_of_batches_fits_without_its_length(cloth: Path) -> None:
    paths = sorted((cloth / "train/good").iterdir())

    def stream() -> Iterator[np.ndarray]:
        for path in paths:
            yield np.asarray(Image.open(path).convert("RGB"))

    model = NPad("filterbank", **SMALL, n_features=20, holdout=0.3).fit(stream())
    assert model.n_images_ == 12
    assert model.members_[-1].centroids.shape[1] == 20


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"fusion": "sum", "fusion_weight": 0.7},
        {"fusion": "euclidean"},
        {"nominal_set": None, "factor_dtype": "float32", "window": 99},
        {"nominal_set": "kmeans", "n_centroids": 30, "factor_dtype": "bfloat16"},
        {"n_features": 16, "score_window": 3, "eps": 0.01, "holdout": 0.0},
        {"gaussians": "joint", "layers": (2, 3), "map_layers": (1, 2, 3), "fusion": "sum"},
        {"map_layers": (1,), "layers": (2, 3), "map_weight": 0.9},
        {"factor_dtype": "int8", "score_window": 3},
        {"factor_dtype": "int8", "gaussians": "joint", "map_layers": (1, 2, 3), "layers": (2, 3)},
        {"n_features": 16, "reduction": "random", "image_size": (64, 96), "layers": (2, 3)},
    ],
)
def test_save_and_load(cloth: Path, tmp_path: Path, arguments: dict[str, object]) -> None:
    model = NPad("filterbank", **{**SMALL, **arguments}).fit(cloth / "train/good")
    path = tmp_path / "model.npad"
    model.save(path)
    loaded = NPad.load(path)
    assert_equal_models(model, loaded)
    assert loaded.settings() == model.settings()
    a, b = model.predict(cloth / "test"), loaded.predict(cloth / "test")
    assert np.array_equal(a.scores, b.scores)
    assert all(np.array_equal(x, y) for x, y in zip(a.maps, b.maps, strict=True))
    assert np.isfinite(a.scores).all()


def test_a_model_of_many_channels_keeps_the_leading_ones(
    untrained_resnet18: Path, cloth: Path, tmp_path: Path
) -> None:
    small = {"image_size": 64, "n_centroids": 50, "weights": untrained_resnet18, "progress": False}
    model, whole = (
        NPad("resnet18", **small, n_features=n).fit(cloth / "train/good") for n in ("auto", None)
    )
    *_, third, nominal = (m.n_features for m in model.members_)
    assert third is not None
    assert third <= MOST_FEATURES < 256
    assert nominal is None
    assert [m.n_features for m in whole.members_] == [None] * 4
    assert model.nbytes < whole.nbytes
    model.save(tmp_path / "m.npad")
    loaded = NPad.load(tmp_path / "m.npad")
    assert_equal_models(model, loaded)
    found = loaded.predict(cloth / "test").scores
    assert np.array_equal(found, model.predict(cloth / "test").scores)
    assert np.corrcoef(found, whole.predict(cloth / "test").scores)[0, 1] > 0.8


def test_bytes_score_as_float32_does(cloth: Path) -> None:
    """Two models of the same images whose factors are stored otherwise."""
    exact, bytes_ = (
        NPad("filterbank", **SMALL, nominal_set=None, factor_dtype=dtype).fit(cloth / "train/good")
        for dtype in ("float32", "int8")
    )
    assert bytes_.nbytes < 0.35 * exact.nbytes
    a, b = exact.predict(cloth / "test"), bytes_.predict(cloth / "test")
    np.testing.assert_allclose(b.scores, a.scores, rtol=0.03)
    assert not np.array_equal(a.scores, b.scores)


def maps_of(path: Path, images: Path, **settings: object) -> np.ndarray:
    """Maps of a saved model, some of whose settings are others: nothing is fitted again."""
    model = NPad.load(path).set_params(**settings)
    model.save(path.with_name("changed.npad"))
    return np.stack(NPad.load(path.with_name("changed.npad")).predict(images).maps)


def test_fusion_weights_0_and_1_are_one_distance_alone(
    model: NPad, cloth: Path, tmp_path: Path
) -> None:
    model.save(tmp_path / "product.npad")
    joint = {**SMALL, "gaussians": "joint"}
    standardised = NPad("filterbank", **joint, fusion="sum").fit(cloth / "train/good")
    standardised.save(tmp_path / "sum.npad")
    for name, weight in {"mahalanobis": 1, "euclidean": 0}.items():
        kind = "mahalanobis_map" if weight else name
        moments = standardised.standardization_[kind]
        for fusion, offset, scale in (("product", 0, 1), ("sum", moments.mean, moments.std)):
            path = tmp_path / f"{fusion}.npad"
            fused = maps_of(path, cloth / "test", map_weight=weight)
            expected = maps_of(path, cloth / "test", fusion=name)
            np.testing.assert_allclose(fused * scale + offset, expected, rtol=1e-4)


@pytest.mark.parametrize("fusion", ["product", "sum"])
def test_a_model_file_without_a_fusion_weight_has_the_weight_it_was_made_with(
    fusion: str, cloth: Path, tmp_path: Path
) -> None:
    fitted = NPad("filterbank", **SMALL, fusion=fusion, fusion_weight=0.4).fit(cloth / "train/good")
    path = tmp_path / "model.npad"
    fitted.save(path)
    header, content = read_model(path)
    assert header["settings"].pop("fusion_weight") == 0.4
    write_model(path, header, content)
    expected = fitted.predict(cloth / "test")
    assert np.array_equal(NPad.load(path).predict(cloth / "test").scores, expected.scores)
    fitted.fusion_weight = 0.8
    assert not np.array_equal(fitted.predict(cloth / "test").scores, expected.scores)


def test_batches_do_not_change_scores(model: NPad, cloth: Path, tmp_path: Path) -> None:
    model.save(tmp_path / "m.npad")
    other = NPad.load(tmp_path / "m.npad")
    other.batch_size = 3
    a, b = model.predict(cloth / "test").scores, other.predict(cloth / "test").scores
    np.testing.assert_allclose(a, b, rtol=1e-5)


def test_held_out_images_are_fitted_in_the_end(cloth: Path) -> None:
    known = {**SMALL, "eps": 0.01, "window": 3}
    with_holdout = NPad("filterbank", **known, holdout=0.4).fit(cloth / "train/good")
    without = NPad("filterbank", **known, holdout=0.0).fit(cloth / "train/good")
    for a, b in zip(with_holdout.members_[:3], without.members_[:3], strict=True):
        torch.testing.assert_close(a.mean, b.mean, rtol=1e-4, atol=1e-5)


def test_one_image_is_too_few(cloth: Path) -> None:
    with pytest.raises(ValueError, match="at least 2 defect-free images are needed"):
        NPad("filterbank", **SMALL).fit([next((cloth / "train/good").iterdir())])


def test_predict_before_fit() -> None:
    with pytest.raises(RuntimeError, match=r"not fitted; call fit or NPad\.load"):
        NPad("filterbank").predict("anything")


def test_arrays_with_negative_strides(cloth: Path) -> None:
    """Mirrored views, of which PyTorch cannot make a tensor, are images like any other."""
    paths = sorted((cloth / "train/good").iterdir())[:4]
    pixels = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])
    mirrored = pixels[::-1, :, ::-1, ::-1]
    with pytest.raises(ValueError, match="negative"):
        torch.from_numpy(mirrored)
    few = {**SMALL, "n_centroids": 20, "eps": 0.01}
    of_view, of_copy = (NPad("filterbank", **few).fit(a) for a in (mirrored, mirrored.copy()))
    assert_equal_models(of_view, of_copy)
    planes = mirrored[:2].transpose(0, 3, 1, 2)
    actual, expected = (of_view.predict(a) for a in (planes, mirrored[:2].copy()))
    np.testing.assert_array_equal(actual.scores, expected.scores)
    np.testing.assert_array_equal(actual.maps, expected.maps)


def test_more_features_than_channels(cloth: Path) -> None:
    with pytest.raises(ValueError, match="n_features=5000 is more than the"):
        NPad("filterbank", **SMALL, n_features=5000).fit(cloth / "train/good")


@pytest.mark.parametrize("field", ["settings", "members", "backbones", "n_images"])
@pytest.mark.parametrize("value", [None, [], {"window": 2}, "x", -3])
def test_forged_headers_are_model_file_errors(
    model: NPad, tmp_path: Path, field: str, value: object
) -> None:
    path = tmp_path / "model.npad"
    model.save(path)
    header, content = read_model(path)
    write_model(path, header | {field: value}, content)
    with pytest.raises(ModelFileError, match=r"model\.npad"):
        NPad.load(path)


def test_model_of_another_backbone(model: NPad, tmp_path: Path) -> None:
    path = tmp_path / "model.npad"
    model.save(path)
    header, content = read_model(path)
    header["backbones"][0]["weights_hash"] = "0" * 64
    write_model(path, header, content)
    with pytest.raises(ModelFileError, match="was fitted on filterbank with weights 000000000000"):
        NPad.load(path)


def test_predict_from_two_threads(model: NPad, cloth: Path) -> None:
    expected = model.predict(cloth / "test").scores
    found: list[np.ndarray] = []
    workers = [
        threading.Thread(target=lambda: found.append(model.predict(cloth / "test").scores))
        for _ in range(2)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(np.array_equal(scores, expected) for scores in found)
    assert len(found) == 2


class Forgetful(NPad):
    """As if another thread let go of what is kept, once it is stored and before it is used."""

    def __setattr__(self, name: str, value: object) -> None:
        kept = ("_in_force", "_scoring", "_graphs")
        super().__setattr__(name, None if name in kept else value)


def test_what_is_kept_may_be_gone_at_any_time(model: NPad, cloth: Path) -> None:
    forgetful = copy.copy(model)
    forgetful.__class__ = Forgetful
    forgetful._forget()
    found = forgetful.predict(cloth / "test" / "good").scores
    assert np.array_equal(found, model.predict(cloth / "test" / "good").scores)


def test_real_images(data: Path, weights: Path) -> None:
    """A twelfth of the magnetic tiles: far above chance, and float16 factors cost nothing."""
    (category,) = find_categories(data / "mtd")
    category = replace(category, train=category.train[::12], test=category.test[::6])
    file = weights / "resnet18_layers123.safetensors"
    model = NPad(
        "resnet18", weights=file, factor_dtype="float32", n_features=None, n_centroids=1024,
        progress=False,
    )  # fmt: skip
    wide = evaluate(model, category, progress=False).metrics
    model.members_ = tuple(
        m if m.factor is None else replace(m, factor=m.factor.half()) for m in model.members_
    )
    half = score(model, category, progress=False).metrics
    assert wide["auroc"] > 0.85
    assert wide["pixel_auroc"] > 0.75
    assert half["auroc"] == pytest.approx(wide["auroc"], abs=1e-3)
