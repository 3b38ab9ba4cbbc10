"""The one list of what a fit leaves: everything that goes through it, and files of earlier versions."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from npad import NPad
from npad.learned import MEANINGS, TENSORS, Learned
from npad.model_file import ModelFileError, read_model, write_model
from npad.settings import Settings

# Written by npad 0.1.0 before settings and learned values had a list.
OLD = Path(__file__).parent / "data" / "version_0_1.npad.bin"
OLD_SCORES = [0.3272726535797119, -0.3054666519165039, 0.8085587024688721, 0.8831512928009033]


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (12, 24, 32, 3), dtype=np.uint8)


@pytest.fixture
def model(images: np.ndarray) -> NPad:
    small = {"image_size": (24, 32), "n_centroids": 8, "n_features": 6, "progress": False}
    return NPad("filterbank", **small).fit(images)


def test_a_model_file_of_version_0_1(images: np.ndarray, tmp_path: Path) -> None:
    model = NPad.load(OLD)
    np.testing.assert_allclose(model.predict(images[:4]).scores, OLD_SCORES, rtol=1e-5)
    model.save(tmp_path / "new.npad")
    old, new = read_model(OLD), read_model(tmp_path / "new.npad")
    added = {"bit_depth": None}, {"darkest": 0.0, "n_bits": None}
    assert new[0] == old[0] | added[1] | {"settings": old[0]["settings"] | added[0]}
    assert all(torch.equal(old[1][name], tensor) for name, tensor in new[1].items())


def test_every_field_is_an_attribute_of_a_fitted_model(model: NPad) -> None:
    assert MEANINGS.keys() == {f.name for f in fields(Learned)}
    for name in MEANINGS:
        assert hasattr(model, f"{name}_")
        assert not hasattr(NPad("filterbank"), f"{name}_")
    assert model.nbytes == sum(getattr(model, f"{t.name}_").nbytes for t in TENSORS)


def test_move(model: NPad) -> None:
    """To a device without data, which every machine has."""
    learned = Learned(**{name: getattr(model, f"{name}_") for name in MEANINGS})
    there = learned.to(torch.device("meta"))
    assert {x.device.type for x in there.tensors().values()} == {"meta"}
    assert there.nbytes == learned.nbytes
    assert there.to_json() == learned.to_json()


def test_a_file_holds_what_its_settings_need(
    model: NPad, images: np.ndarray, tmp_path: Path
) -> None:
    """A fusion that was changed after the fit takes only its own tensors along."""
    for fusion, names in {
        "mahalanobis": {"projection", "mean", "factor"},
        "euclidean": {"projection", "centroids"},
    }.items():
        model.fusion = fusion
        model.save(tmp_path / "m.npad")
        assert read_model(tmp_path / "m.npad")[1].keys() == names
        expected = model.predict(images).scores
        assert np.array_equal(NPad.load(tmp_path / "m.npad").predict(images).scores, expected)


@pytest.mark.parametrize("tensor", TENSORS, ids=lambda tensor: tensor.name)
def test_a_tensor_of_another_shape_or_dtype_is_named(
    tensor: object, model: NPad, tmp_path: Path
) -> None:
    name = tensor.name  # type: ignore[attr-defined]
    path = tmp_path / "m.npad"
    model.save(path)
    header, tensors = read_model(path)
    for wrong in (tensors[name][:-1], tensors[name].double(), None):
        content = {k: x for k, x in {**tensors, name: wrong}.items() if x is not None}
        write_model(path, header, content)
        with pytest.raises(ModelFileError, match=rf"m\.npad: tensor '{name}' "):
            NPad.load(path)


def test_dtypes_and_shapes_come_from_the_settings() -> None:
    sizes = {"P": 6, "D": 9, "C": 4, "packed": 32, "K": 5}
    expected = Learned.expected(Settings(n_features=4, factor_dtype="bfloat16"), sizes)
    assert expected == {
        "projection": (torch.float32, (9, 4)),
        "mean": (torch.float32, (6, 4)),
        "factor": (torch.bfloat16, (6, 32)),
        "centroids": (torch.float32, (5, 4)),
    }
    assert Learned.expected(Settings(nominal_set=None), sizes).keys() == {"mean", "factor"}
