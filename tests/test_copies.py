"""Copies of a model: in the process, in a pickle, in another process."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
from operator import methodcaller
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from npad import NPad
from npad.features.backbone import BackboneError

SMALL = {"image_size": 32, "n_centroids": 20, "progress": False}


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (6, 32, 32, 3), dtype=np.uint8)


@pytest.fixture(scope="module", params=[False, True], ids=["eager", "compile"])
def model(request: pytest.FixtureRequest, images: np.ndarray) -> NPad:
    """Used before it is copied, so that there is something that must not be copied."""
    fitted = NPad("filterbank", **SMALL).fit(images)
    fitted.compile = request.param
    return fitted


def test_a_pickle_finds_its_backbone_again(model: NPad, images: np.ndarray) -> None:
    expected = model.predict(images)
    content = pickle.dumps(model)
    assert len(content) < model.nbytes + 20_000  # no backbone, no index
    twin = pickle.loads(content)
    assert twin.get_params() == model.get_params()
    assert np.array_equal(twin.predict(images).scores, expected.scores)


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy], ids=["copy", "deepcopy"])
def test_copies_share_the_backbone(make: object, model: NPad, images: np.ndarray) -> None:
    expected = model.predict(images)
    twin = make(model)  # type: ignore[operator]
    assert twin.scorer().networks[0] is model.scorer().networks[0]
    assert (twin.members_ is model.members_) is (make is copy.copy)
    assert np.array_equal(twin.predict(images).scores, expected.scores)
    twin.set_params(fusion_weight=0.9, compile=False)
    assert not np.array_equal(twin.predict(images).scores, expected.scores)
    assert np.array_equal(model.predict(images).scores, expected.scores)


def test_a_model_that_is_not_fitted(images: np.ndarray) -> None:
    model = NPad("filterbank", **SMALL)
    for twin in (copy.copy(model), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.get_params() == model.get_params()
        assert twin.fit(images).n_images_ == 6


def test_a_process_that_is_spawned(model: NPad, images: np.ndarray) -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        # Not a function of this file, which another process cannot import.
        prediction = pool.apply_async(methodcaller("predict", images), (model,)).get(timeout=300)
    np.testing.assert_allclose(prediction.scores, model.predict(images).scores, rtol=1e-5)


def test_a_copy_outlives_the_file_of_weights(
    weights: Path, images: np.ndarray, tmp_path: Path
) -> None:
    """But a pickle needs it, and the one it was fitted with."""
    file = tmp_path / "weights.safetensors"
    state = load_file(weights / "resnet18_layers123.safetensors")
    save_file(state, file)
    model = NPad("resnet18", weights=file, **SMALL).fit(images)
    expected = model.predict(images).scores
    content = pickle.dumps(model)
    save_file({name: 2 * tensor for name, tensor in state.items()}, file)
    with pytest.raises(
        BackboneError, match=r"was fitted on resnet18 with weights .* give the same"
    ):
        pickle.loads(content).predict(images)
    file.rename(tmp_path / "other.safetensors")
    for twin in (model, copy.copy(model), copy.deepcopy(model)):
        assert np.array_equal(twin.predict(images).scores, expected)
    twin = pickle.loads(content)
    with pytest.raises(BackboneError, match="there is no such file"):
        twin.predict(images)
    twin.weights = tmp_path / "other.safetensors"
    with pytest.raises(BackboneError, match=r"was fitted on resnet18 .* give the same file with"):
        twin.predict(images)
    twin.weights = weights / "resnet18_layers123.safetensors"  # where the same ones lie
    assert np.array_equal(twin.predict(images).scores, expected)


def test_a_fit_takes_a_file_of_weights_that_was_replaced(
    weights: Path, images: np.ndarray, tmp_path: Path
) -> None:
    file = tmp_path / "weights.safetensors"
    state = load_file(weights / "resnet18_layers123.safetensors")
    save_file(state, file)
    model = NPad("resnet18", weights=file, **SMALL).fit(images)
    before = model.backbones_[0]["weights_hash"]
    save_file({name: tensor.flip(0) for name, tensor in state.items()}, file)
    model.predict(images)
    assert model.fit(images).backbones_[0]["weights_hash"] != before
