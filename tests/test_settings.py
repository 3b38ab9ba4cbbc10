"""The one list of arguments: what each may be, and that everything else agrees with it."""

from __future__ import annotations

import inspect
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest
import torch
from sklearn.base import clone

from npad import NPad
from npad.settings import ARGUMENTS, Settings

REFUSED = [
    ({"backbone": ""}, "backbone must be the name of a timm model"),
    ({"backbone": 18}, "backbone must be the name of a timm model"),
    ({"backbone": []}, "backbone must be the name of a timm model .* or a list of such names"),
    ({"backbone": ["resnet18", 5]}, "backbone must be the name of a timm model"),
    ({"backbone": ["resnet18", ""]}, "backbone must be the name of a timm model"),
    ({"backbone": {"resnet18", "resnet34"}}, "backbone must be the name of a timm model"),
    ({"backbone": None}, "backbone must be the name of a timm model"),
    ({"backbone": ["timm/a", "b", "a"]}, r"of different models, got \('a', 'b', 'a'\)"),
    ({"backbone": ["a", "a"]}, r"backbone must be a list of different models, got \('a', 'a'\)"),
    ({"layers": []}, "layers must be a sequence of levels"),
    ({"layers": "23"}, "layers must be a sequence of levels"),
    ({"layers": (2, -1)}, "layers must be a sequence of levels"),
    ({"layers": iter((2, 3))}, "layers must be a sequence of levels"),
    ({"layers": np.array(2)}, "layers must be a sequence of levels"),
    ({"layers": ("stages.1",)}, r"layers must be a sequence of levels such as \(2, 3\)"),
    ({"layers": ("layer2", "layer3")}, r"levels by their numbers, here \(2, 3\), got \('layer2'"),
    ({"layers": "2,3"}, r"levels by their numbers, here \(2, 3\), got '2,3'"),
    ({"map_layers": "layer1"}, r"map_layers must be .* levels by their numbers, here \(1,\)"),
    ({"map_layers": (1, -1)}, "map_layers must be a sequence of levels"),
    ({"map_layers": (1.0, 2.0)}, "map_layers must be a sequence of levels"),
    ({"map_layers": (True,)}, "map_layers must be a sequence of levels"),
    ({"map_layers": "none"}, "map_layers must be a sequence of levels"),
    ({"map_layers": iter((1, 2))}, "map_layers must be a sequence of levels"),
    ({"map_layers": 1.5}, "map_layers must be a sequence of levels"),
    ({"gaussians": None}, "gaussians must be one of 'per_layer', 'joint', got None"),
    ({"gaussians": ("joint",)}, "gaussians must be one of"),
    ({"gaussians": "each"}, "gaussians must be one of 'per_layer', 'joint', got 'each'"),
    (
        {"gaussians": "joint", "map_layers": (1, 2), "n_features": 9},
        "n_features mixes the channels .* leave out one, or use gaussians='per_layer'",
    ),
    (
        {"image_size": 0},
        r"image_size must be a positive int or \(height, width\), or 'native', got 0",
    ),
    ({"image_size": 64.0}, "image_size must be a positive int"),
    ({"image_size": (64, 64, 3)}, "image_size must be a positive int"),
    ({"image_size": (True, 64)}, "image_size must be a positive int"),
    ({"image_size": "64"}, "image_size must be a positive int"),
    ({"roi": (0, 0, 50, 50)}, r"roi must be the path of a mask, an \(H, W\) array .* in fractions"),
    ({"roi": np.ones((2, 2))}, "roi must be the path of a mask"),
    ({"rois": "_roi.png"}, r"rois must be a pattern such as '\{\}_roi.png'"),
    (
        {"align": "euclidean", "rois": "{}_roi.png"},
        "align and a region of interest exclude each other",
    ),
    ({"align": "translation", "roi": (0, 0, 1, 0.5)}, "align and a region of interest exclude"),
    ({"align": "affine"}, "align must be one of 'translation', 'euclidean', None, got 'affine'"),
    ({"align": True}, "align must be one of 'translation', 'euclidean', None, got True"),
    ({"align": ("euclidean",)}, "align must be one of"),
    ({"align": "none"}, "align must be one of .* got 'none'"),
    ({"bit_depth": 17}, "bit_depth must be an int from 1 to 16, got 17"),
    ({"bit_depth": 12.0}, "bit_depth must be an int from 1 to 16"),
    ({"max_pixels": 0}, "max_pixels must be an int of at least 1"),
    ({"weights": 5}, "weights must be the path of a file, or a list .*, got 5"),
    ({"weights": []}, "weights must be the path of a file, or a list of one for each backbone"),
    ({"weights": ["a", 5]}, "weights must be the path of a file, or a list"),
    ({"weights": ["a", "b"]}, "weights must be one file for each of filterbank, .* got 2 files"),
    (
        {"backbone": ["resnet18", "resnet34"], "weights": "r18.pt"},
        r"weights must be one file for each of resnet18, resnet34, in this order .* got r18\.pt",
    ),
    (
        {"backbone": ["resnet18", "resnet34"], "weights": ["a", None, "c"]},
        "weights must be one file for each of resnet18, resnet34, .* got 3 files",
    ),
    ({"window": 4}, "window must be 'auto' or an odd int of at least 1, got 4"),
    ({"window": "3"}, "window must be 'auto' or an odd int of at least 1, got '3'"),
    ({"window": True}, "window must be 'auto' or an odd int of at least 1, got True"),
    ({"window": 3.0}, "window must be 'auto' or an odd int of at least 1, got 3.0"),
    ({"score_window": 0}, "score_window must be an odd int"),
    ({"eps": "big"}, "eps must be 'auto' or a number of at least 0, got 'big'"),
    ({"eps": -1.0}, "eps must be 'auto' or a number"),
    ({"eps": math.inf}, "eps must be 'auto' or a number"),
    ({"eps": True}, "eps must be 'auto' or a number of at least 0, got True"),
    ({"nominal_set": "random"}, "nominal_set must be one of 'kcenter', 'kmeans', None"),
    ({"nominal_set": True}, "nominal_set must be one of"),
    ({"n_centroids": -1}, "n_centroids must be a whole number of at least 1 or a fraction below 1"),
    ({"n_centroids": 2.5}, "n_centroids must be a whole number .* got 2.5"),
    ({"n_centroids": 0}, "n_centroids must be a whole number"),
    ({"n_centroids": 10**400}, "n_centroids must be a whole number"),
    ({"n_centroids": math.nan}, "n_centroids must be a whole number"),
    ({"n_centroids": math.inf}, "n_centroids must be a whole number"),
    ({"n_centroids": True}, "n_centroids must be a whole number"),
    ({"fusion": "max"}, "fusion must be one of 'product'"),
    ({"fusion_weight": 1.5}, "fusion_weight must be a number from 0 to 1, got 1.5"),
    ({"fusion_weight": -0.1}, "fusion_weight must be a number from 0 to 1, got -0.1"),
    ({"fusion_weight": math.nan}, "fusion_weight must be a number from 0 to 1, got nan"),
    ({"fusion_weight": "half"}, "fusion_weight must be a number from 0 to 1, got 'half'"),
    ({"fusion_weight": True}, "fusion_weight must be a number from 0 to 1, got True"),
    ({"map_weight": 1.5}, "map_weight must be a number from 0 to 1, got 1.5"),
    ({"map_weight": -0.1}, "map_weight must be a number from 0 to 1, got -0.1"),
    ({"map_weight": math.nan}, "map_weight must be a number from 0 to 1, got nan"),
    ({"map_weight": "half"}, "map_weight must be a number from 0 to 1, got 'half'"),
    ({"map_weight": True}, "map_weight must be a number from 0 to 1, got True"),
    ({"map_weight": None}, "map_weight must be a number from 0 to 1, got None"),
    ({"factor_dtype": "int4"}, "factor_dtype must be one of 'float32'"),
    ({"factor_dtype": torch.float16}, "factor_dtype must be one of"),
    ({"n_features": 2.5}, "n_features must be 'auto', None or an int of at least 1, got 2.5"),
    ({"n_features": 0}, "n_features must be 'auto', None or an int of at least 1"),
    ({"n_features": True}, "n_features must be 'auto', None or an int of at least 1"),
    ({"reduction": "ica"}, "reduction must be one of 'pca', 'random'"),
    ({"holdout": 0.9}, "holdout must be a number from 0 to 0.5, got 0.9"),
    ({"holdout": False}, "holdout must be a number from 0 to 0.5, got False"),
    ({"holdout": 0.0}, "need held-out images"),
    ({"nominal_set": None, "fusion": "product"}, "needs a nominal set"),
    ({"seed": "x"}, "seed must be an int of at most 64 bits, got 'x'"),
    ({"seed": 1.5}, "seed must be an int"),
    ({"seed": None}, "seed must be an int"),
    ({"seed": True}, "seed must be an int"),
    ({"backbone_dtype": "float64"}, "backbone_dtype must be one of"),
    ({"compile": "on"}, "compile must be one of True, False, got 'on'"),
    ({"compile": 1}, "compile must be one of True, False, got 1"),
    ({"batch_size": 0}, "batch_size must be an int of at least 1, got 0"),
    ({"batch_size": 2.5}, "batch_size must be an int of at least 1, got 2.5"),
    ({"batch_size": True}, "batch_size must be an int of at least 1"),
    ({"progress": "yes"}, "progress must be one of True, False, None"),
]


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (4, 32, 32, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def fitted(images: np.ndarray) -> NPad:
    return NPad("filterbank", image_size=32, n_centroids=20, progress=False).fit(images)


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_what_is_refused_is_refused_by_name(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^NPad: .*{message}"):
        NPad(**{"backbone": "filterbank", **arguments})  # type: ignore[arg-type]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_an_attribute_that_is_set_later_is_checked_too(
    arguments: dict[str, object], message: str, fitted: NPad, images: np.ndarray
) -> None:
    model = clone(fitted)
    for name, value in arguments.items():
        setattr(model, name, value)
    with pytest.raises(ValueError, match=message):  # before the images are looked at
        model.fit("no such folder")
    vars(model).update({k: v for k, v in vars(fitted).items() if k.endswith("_")})
    for use in (model.predict, model.predict_batches, model.embed):
        with pytest.raises(ValueError, match=message):
            use(images)


@pytest.mark.parametrize("prefix", ["", "timm/", "hf-hub:timm/", "hf_hub:timm/"])
def test_a_name_of_the_hub_is_kept_as_timm_has_it(prefix: str) -> None:
    assert Settings(backbone=f"{prefix}resnet18.a1_in1k").backbone == "resnet18.a1_in1k"


def test_what_is_accepted() -> None:
    given = {
        "layers": [2, 3],
        "image_size": np.int64(96),
        "weights": Path("w.pt"),
        "window": np.int32(5),
        "n_centroids": 64.0,
        "eps": np.float32(0.5),
        "fusion_weight": 1,
        "seed": -(2**63),
        "fusion": np.str_("sum"),
    }
    settings = Settings(**given)  # type: ignore[arg-type]
    assert settings.layers == (2, 3)
    assert Settings(layers=2).layers == (2,)  # type: ignore[arg-type]
    assert settings.image_size == (96, 96)
    assert (settings.weights, settings.window, settings.n_centroids) == ("w.pt", 5, 64)
    assert json.loads(json.dumps(settings.to_json()))["eps"] == 0.5
    assert type(settings.fusion) is str
    assert Settings(nominal_set=None).fusion == "mahalanobis"
    assert Settings(n_centroids=0.25).n_centroids == 0.25
    assert Settings(map_layers=[]).map_layers == ()
    assert Settings(map_layers=1).map_layers == (1,)  # type: ignore[arg-type]
    assert Settings(map_weight=np.float64(0)).map_weight == 0  # type: ignore[arg-type]
    assert Settings(gaussians="joint", n_features=9).levels_of_maps == ()
    assert Settings(fusion="euclidean", map_layers=(9,)).levels_of_maps == ()
    assert Settings(backbone=["resnet18"], weights=["w.pt"]).weights == "w.pt"  # type: ignore[arg-type]
    assert Settings(backbone=["timm/resnet18"]).backbone == "resnet18"
    two = Settings(backbone=["resnet18", "filterbank"], weights=(Path("w.pt"), None))
    assert two.networks == (("resnet18", "w.pt"), ("filterbank", None))
    assert Settings(**two.to_json()) == two


def test_the_signature_of_npad_agrees() -> None:
    parameters = list(inspect.signature(NPad.__init__).parameters.values())[1:]
    assert [p.name for p in parameters] == [argument.name for argument in ARGUMENTS]
    assert [p.default for p in parameters] == [argument.default for argument in ARGUMENTS]
    assert all(
        type(p.default) is type(a.default) for p, a in zip(parameters, ARGUMENTS, strict=True)
    )
    hints = get_type_hints(NPad.__init__)
    assert hints.keys() == {"return", *(argument.name for argument in ARGUMENTS)}


def test_arguments_are_stored_as_they_are_given() -> None:
    given = {
        "backbone": np.str_("filterbank"),
        "layers": [3, 1],
        "image_size": np.int64(96),
        "weights": Path("w.pt"),
        "n_centroids": 64.0,
        "eps": np.float32(0.5),
        "device": torch.device("cpu"),
    }
    found = NPad(**given).get_params()  # type: ignore[arg-type]
    assert list(found) == [argument.name for argument in ARGUMENTS]
    assert all(found[name] is value for name, value in given.items())


def test_help_says_something_about_each() -> None:
    assert NPad.__doc__ is not None
    for argument in ARGUMENTS:
        assert argument.help.endswith(".")
        assert f"{argument.name} : {argument.help}" in NPad.__doc__
    for name in ("members_", "n_images_", "backbones_"):
        assert f"    {name} : " in NPad.__doc__


def test_scikit_learn_clones_it(fitted: NPad) -> None:
    model = NPad("filterbank", layers=[2, 3], image_size=(32, 48), eps=0.1, device="auto")
    twin = clone(model)
    assert twin is not model
    assert twin.get_params() == model.get_params()
    fresh = clone(fitted)
    assert not [name for name in vars(fresh) if name.endswith("_") and name != "settings_"]
    with pytest.raises(RuntimeError, match="not fitted"):
        fresh.predict_batches("anywhere")


def test_set_params() -> None:
    model = NPad("filterbank")
    assert model.set_params(window=5, eps=0.1) is model
    assert (model.window, model.eps) == (5, 0.1)
    with pytest.raises(ValueError, match=r"there is no argument 'windows'; there are backbone, .*"):
        model.set_params(windows=3)


def test_what_a_fitted_model_heeds(fitted: NPad, images: np.ndarray) -> None:
    """A change of what the fit has used waits for the next fit, also in the model file."""
    before = fitted.predict(images)
    model = NPad(**fitted.get_params()).fit(images)
    model.set_params(window=5, image_size=64, n_centroids=3, backbone="resnet18")
    model.nominal_set = None  # nor does the fusion that would follow from it
    after = model.predict(images)
    assert np.array_equal(after.scores, before.scores)
    model.batch_size = 3
    kept = model.settings()
    assert (kept["window"], kept["image_size"], kept["n_centroids"]) == ("auto", [32, 32], 20)
    assert (kept["backbone"], kept["batch_size"]) == ("filterbank", 3)
    model.fusion_weight = 0.9
    assert not np.array_equal(model.predict(images).scores, before.scores)


def test_a_model_without_centroids_goes_on_without_them(images: np.ndarray) -> None:
    model = NPad("filterbank", image_size=32, nominal_set=None, progress=False).fit(images)
    before = model.predict(images)
    model.nominal_set = "kcenter"
    assert np.array_equal(model.predict(images).scores, before.scores)


@pytest.mark.parametrize(
    ("fitted_with", "then", "lacks"),
    [
        ("mahalanobis", "product", "a nominal set"),
        ("euclidean", "mahalanobis", "Gaussians"),
        ("product", "sum", "a standardization"),
        ("mahalanobis", "sum", "a nominal set and a standardization"),
    ],
)
def test_a_fusion_that_the_fit_did_not_prepare(
    fitted_with: str, then: str, lacks: str, images: np.ndarray, tmp_path: Path
) -> None:
    model = NPad("filterbank", image_size=64, n_centroids=20, fusion=fitted_with, progress=False)
    model.fit(images).fusion = then
    message = f"^NPad: fusion='{then}' needs {lacks}, which a fit with fusion='{fitted_with}' does"
    for use in (model.predict, model.predict_batches, lambda _: model.save(tmp_path / "model")):
        with pytest.raises(ValueError, match=message):
            use(images)
    assert not list(tmp_path.iterdir())
    model.fit(images).save(tmp_path / "model")
    NPad.load(tmp_path / "model").predict(images)


def test_settings_are_what_a_model_file_keeps(fitted: NPad) -> None:
    assert fitted.settings().keys() == {a.name for a in ARGUMENTS} - {
        "device",
        "max_pixels",
        "progress",
        "calibration_folds",
        "roi",
    }
    json.dumps(fitted.settings(), allow_nan=False)


def test_the_list_needs_no_library() -> None:
    code = "import sys, npad.settings; print({'torch', 'numpy', 'typer'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_a_list_that_changes_is_seen(images: np.ndarray) -> None:
    model = NPad("filterbank", layers=[2, 3])
    assert model.settings()["layers"] == [2, 3]
    model.layers.append(4)  # type: ignore[union-attr]
    assert model.settings()["layers"] == [2, 3, 4]
    model.set_params(layers=(2,), window=7)
    assert (model.settings()["layers"], model.settings()["window"]) == ([2], 7)


def test_smoothing_follows_the_shorter_side_of_images() -> None:
    """Up to 1024 pixels, whose small defects it would hide; what is chosen is taken."""
    wanted = {256: 4.0, (512, 1024): 8.0, (1024, 512): 8.0, 1024: 16.0, 4096: 16.0}
    for size, sigma in wanted.items():
        assert Settings(image_size=size).sigma == sigma
    assert Settings(image_size=4096, smoothing=30).sigma == 30
    assert Settings(image_size=4096, smoothing=0).sigma == 0
    for wrong in (-1, math.inf, math.nan, "4", True):
        with pytest.raises(ValueError, match=r"^NPad: smoothing must be a number"):
            Settings(smoothing=wrong)
