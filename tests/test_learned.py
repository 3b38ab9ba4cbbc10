"""The one list of what a fit leaves: everything that goes through it, and files of earlier versions."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from npad import NPad
from npad.learned import MEANINGS, MEMBER_MEANINGS, Learned, LearnedMember, _tensor
from npad.members import Member
from npad.model_file import ModelFileError, read_model, write_model
from npad.old_models import upgraded
from npad.settings import Settings

# Written by npad 0.1.0 before settings and learned values had a list.
OLD = Path(__file__).parent / "data" / "version_0_1.npad.bin"
GAUSSIAN = ("projection", "mean", "factor")
OLD_SCORES = [0.3272726535797119, -0.3054666519165039, 0.8085587024688721, 0.8831512928009033]


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (12, 24, 32, 3), dtype=np.uint8)


@pytest.fixture
def model(images: np.ndarray) -> NPad:
    small = {"image_size": (24, 32), "n_centroids": 8, "n_features": 6, "progress": False}
    return NPad("filterbank", **small).fit(images)


@pytest.fixture(scope="module")
def saved(images: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files of models of both kinds of Gaussians, with all distances."""
    found = {}
    for kind in ("per_layer", "joint"):
        found[kind] = tmp_path_factory.mktemp("saved") / f"{kind}.npad"
        known = {"layers": (2, 3), "image_size": (24, 32), "n_centroids": 8, "fusion": "sum"}
        NPad("filterbank", gaussians=kind, progress=False, **known).fit(images).save(found[kind])
    return found


def test_a_model_file_of_version_0_1(images: np.ndarray, tmp_path: Path) -> None:
    model = NPad.load(OLD)
    np.testing.assert_allclose(model.predict(images[:4]).scores, OLD_SCORES, rtol=1e-5)
    model.save(tmp_path / "new.npad")
    old, new = upgraded(*read_model(OLD)), read_model(tmp_path / "new.npad")
    of_settings = {"bit_depth": None, "false_alarm_rate": 0.01, "confidence": None}
    of_settings |= {"rois": None, "align": None, "tile": None, "overlap": None, "smoothing": None}
    of_all = {"darkest": 0.0, "n_bits": None, "fingerprints": [], "calibration": None}
    of_all |= {"filled": False, "roi_color": None, "n_template": None}
    more = {"radius": None, "borrowed": 0}
    of_all["members"] = [member | more for member in old[0]["members"]]
    assert new[0] == old[0] | of_all | {"settings": old[0]["settings"] | of_settings}
    assert old[1].keys() == new[1].keys()
    assert all(torch.equal(old[1][name], tensor) for name, tensor in new[1].items())
    again = NPad.load(tmp_path / "new.npad")
    assert np.array_equal(again.predict(images[:4]).scores, model.predict(images[:4]).scores)


def test_every_field_is_an_attribute_of_a_fitted_model(model: NPad) -> None:
    assert MEANINGS.keys() == {f.name for f in fields(Learned)}
    for name in MEANINGS:
        assert hasattr(model, f"{name}_")
        assert not hasattr(NPad("filterbank"), f"{name}_")
    assert MEMBER_MEANINGS.keys() == {f.name for f in fields(LearnedMember)}
    assert model.nbytes == sum(x.nbytes for m in model.members_ for x in m.tensors().values())


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
        "mahalanobis": {f"{i}.{name}" for i in range(3) for name in GAUSSIAN},
        "euclidean": {"0.projection", "0.centroids"},
    }.items():
        model.fusion = fusion
        model.save(tmp_path / "m.npad")
        assert read_model(tmp_path / "m.npad")[1].keys() == names
        expected = model.predict(images).scores
        assert np.array_equal(NPad.load(tmp_path / "m.npad").predict(images).scores, expected)


@pytest.mark.parametrize("name", [*(f"2.{name}" for name in GAUSSIAN), "3.centroids"])
def test_a_tensor_of_another_shape_or_dtype_is_named(
    name: str, model: NPad, tmp_path: Path
) -> None:
    path = tmp_path / "m.npad"
    model.save(path)
    header, tensors = read_model(path)
    for wrong in (tensors[name][:-1], tensors[name].double(), None):
        content = {k: x for k, x in {**tensors, name: wrong}.items() if x is not None}
        write_model(path, header, content)
        with pytest.raises(ModelFileError, match=rf"m\.npad: tensor '{name}' "):
            NPad.load(path)


@pytest.mark.parametrize(
    "forged",
    [
        {"network": 1},
        {"network": -1},
        {"network": "x"},
        {"network": None},
        {"levels": []},
        {"levels": [9]},
        {"levels": [1, 2, 3, 1]},
        {"levels": None},
        {"prefix": 3},
        {"prefix": "x"},
        {"prefix": 1000},
        {"a field": "of another"},
    ],
)
@pytest.mark.parametrize("gaussians", ["per_layer", "joint"])
@pytest.mark.parametrize("which", [0, -1])
def test_a_member_that_the_backbones_do_not_make(
    which: int, gaussians: str, forged: dict[str, object], saved: dict[str, Path], tmp_path: Path
) -> None:
    """Under a checksum that is right: an error of the file, and never one of the prediction."""
    path = tmp_path / "m.npad"
    header, tensors = read_model(saved[gaussians])
    header["members"][which]["member"] |= forged
    write_model(path, header, tensors)
    with pytest.raises(ModelFileError, match=r"m\.npad: .*fit and save the model again"):
        NPad.load(path)


@pytest.mark.parametrize("forged", [3, "x", {"euclidean": 3}, {"euclidean": {"mean": 1.0}}])
def test_a_standardization_that_is_none(
    forged: object, saved: dict[str, Path], tmp_path: Path
) -> None:
    path = tmp_path / "m.npad"
    header, tensors = read_model(saved["joint"])
    write_model(path, header | {"standardization": forged}, tensors)
    with pytest.raises(ModelFileError, match=r"m\.npad: has a header that this npad cannot use"):
        NPad.load(path)


def test_dtypes_and_shapes_come_from_the_settings() -> None:
    whole = LearnedMember(
        Member(0, (2, 3)), channels=9, grid=(2, 3), eps=0.1, window=1, n_features=None
    )
    reduced = replace(whole, n_features=4)
    assert reduced.expected(Settings(factor_dtype="bfloat16"), 5) == {
        "projection": (torch.float32, (9, 4)),
        "mean": (torch.float32, (6, 4)),
        "factor": (torch.bfloat16, (6, 32)),
        "centroids": (torch.float32, (5, 4)),
    }
    with_prefix = replace(whole, member=Member(0, (2, 3, 1), prefix=7))
    assert with_prefix.expected(Settings(), 5)["centroids"] == (torch.float32, (5, 7))
    gaussian = replace(whole, member=Member(0, (2,), nominal_set=False))
    assert gaussian.expected(Settings(), 0).keys() == {"mean", "factor"}


@dataclass(frozen=True, eq=False)
class _LearnedWithShading(Learned):
    shading: Tensor | None = _tensor(  # noqa: RUF009
        "H, W", "uint8", "a shading", lambda learned: learned.n_bits is not None
    )


def test_a_tensor_of_all_images(model: NPad) -> None:
    """Beside those of the members, through all that a tensor of a member goes through."""
    known = {name: getattr(model, f"{name}_") for name in MEANINGS}
    shading = torch.zeros(24, 32, dtype=torch.uint8)
    learned = _LearnedWithShading(**known | {"n_bits": 12}, shading=shading)
    bare = Learned(**known)
    assert learned.tensors().keys() == {"shading", *bare.tensors()}
    assert learned.nbytes == bare.nbytes + 24 * 32
    assert learned.to(torch.device("meta")).tensors()["shading"].device.type == "meta"
    values = learned.to_json()
    assert "shading" not in values
    again = _LearnedWithShading.of(values)
    assert again.shading is None
    assert again.having(learned.tensors()).shading is shading
    settings = Settings(image_size=(24, 32))
    members = values["members"]
    assert again.expected(settings, members)["shading"] == (torch.uint8, (24, 32))
    without = replace(again, n_bits=None).expected(settings, members)
    assert without.keys() == bare.tensors().keys()
    assert learned.used_by(replace(settings, fusion="euclidean")).shading is shading
