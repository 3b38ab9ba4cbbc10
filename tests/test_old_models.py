"""Model files of format 1: one backbone, one embedding, one map whose maximum was the score."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from npad import NPad, ops
from npad.features.backbone import Backbone
from npad.model_file import ModelFileError, read_model, write_model
from npad.old_models import upgraded

# Written by npad 0.1.0.
OLD = Path(__file__).parent / "data" / "version_0_1.npad.bin"
FUSIONS = ("product", "sum", "mahalanobis", "euclidean")


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (12, 24, 32, 3), dtype=np.uint8)


def scored_by_format_1(
    header: dict[str, Any], tensors: dict[str, Tensor], images: np.ndarray
) -> tuple[Tensor, Tensor]:
    """Scores and maps, by the kernels, in the way of the npad that wrote such files."""
    settings = header["settings"]
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    x = Backbone("filterbank", layers=settings["layers"])(pixels)
    if "projection" in tensors:
        x = x @ tensors["projection"]
    m = e = None
    if "mean" in tensors:
        m = ops.mahalanobis(x, tensors["mean"], tensors["factor"], tuple(header["grid"]), 1)
    if "centroids" in tensors:
        e, _ = ops.nearest_centroid(x.flatten(0, 2), tensors["centroids"])
        e = e.reshape(x.shape[:3])
    w, known = settings["fusion_weight"], header["standardization"]
    terms = {"mahalanobis": (1.0, 0.0, 0.0), "euclidean": (0.0, 1.0, 0.0)}
    terms["product"] = (w, 1 - w, 0.0)
    if known is not None:
        a, b = w / known["mahalanobis_std"], (1 - w) / known["euclidean_std"]
        terms["sum"] = a, b, -a * known["mahalanobis_mean"] - b * known["euclidean_mean"]
    size = tuple(settings["image_size"])
    fused = m, e, settings["fusion"] == "product", terms[settings["fusion"]]
    maps, scores = ops.anomaly_map(*fused, size, 4 * min(size) / 256)
    return scores, maps


def assert_scored_as_before(path: Path, images: np.ndarray) -> NPad:
    model = NPad.load(path)
    scores, maps = scored_by_format_1(*read_model(path), images)
    found = model.predict(images)
    assert np.array_equal(found.scores, scores.double().numpy())
    assert np.array_equal(np.stack(found.maps), maps.numpy())
    return model


def test_the_file_of_version_0_1_scores_bit_for_bit_as_before(images: np.ndarray) -> None:
    model = assert_scored_as_before(OLD, images[:4])
    assert (model.gaussians, list(model.map_layers), model.map_weight) == ("joint", [], 0.4)
    (member,) = model.members_
    assert (member.member.levels, member.member.prefix, member.window) == ((2, 3), None, 3)


def written_as_format_1(path: Path, model: NPad) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A model whose members are what format 1 knew, as it wrote them."""
    (member,) = model.members_
    settings = model.settings()
    for name in ("gaussians", "map_layers", "map_weight"):
        del settings[name]
    moments = model.standardization_
    header = {
        "npad_version": "0.1.0",
        "settings": settings,
        "backbone": model.backbones_[0],
        "channels": member.channels,
        "grid": list(member.grid),
        "n_images": model.n_images_,
        "n_centroids": member.n_centroids,
        "eps": member.eps,
        "standardization": moments
        and {
            f"{kind}_{field}": value
            for kind, name in (("mahalanobis", "mahalanobis_map"), ("euclidean", "euclidean"))
            for field, value in asdict(moments[name]).items()
        },
    }
    write_model(path, header, member.tensors())
    return header, member.tensors()


@pytest.mark.parametrize("fusion", FUSIONS)
def test_every_fusion_scores_bit_for_bit_as_before(fusion: str, tmp_path: Path) -> None:
    # Of whole strides, up to which today's fit fills images and that of format 1 did not.
    images = np.random.default_rng(0).integers(0, 255, (12, 32, 48, 3), dtype=np.uint8)
    model = NPad(
        "filterbank", layers=(2, 3), map_layers=(), gaussians="joint", image_size=(32, 48),
        window=1, fusion=fusion, fusion_weight=0.7, map_weight=0.7, n_centroids=8, holdout=0.3,
        n_features=None, progress=False,
    ).fit(images)  # fmt: skip
    header, tensors = written_as_format_1(tmp_path / "old.npad", model)
    assert ("mean" in tensors, "centroids" in tensors) == (
        fusion != "euclidean",
        fusion != "mahalanobis",
    )
    again = assert_scored_as_before(tmp_path / "old.npad", images)
    assert np.array_equal(again.predict(images).scores, model.predict(images).scores)
    assert again.settings() == model.settings()
    new, _ = upgraded(header, tensors)
    assert upgraded(new, {}) == (new, {})  # once is enough


FIELDS = ("settings", "backbone", "channels", "grid", "eps", "n_centroids", "standardization")


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_that_is_missing_is_named(field: str, tmp_path: Path) -> None:
    header, tensors = read_model(OLD)
    del header[field]
    write_model(tmp_path / "old.npad", header, tensors)
    with pytest.raises(ModelFileError, match=rf"old\.npad: .*\('{field}' is missing\); fit and"):
        NPad.load(tmp_path / "old.npad")


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("value", ["x", [1], {"mean": 1}])
def test_a_field_that_is_another_thing_is_an_error_of_the_file(
    field: str, value: Any, tmp_path: Path
) -> None:
    header, tensors = read_model(OLD)
    write_model(tmp_path / "old.npad", header | {field: value}, tensors)
    with pytest.raises(ModelFileError, match=r"old\.npad: "):
        NPad.load(tmp_path / "old.npad")


def test_images_of_more_than_1024_pixels_were_smoothed_more() -> None:
    calibration = {"scoring": {"fusion": "product"}}
    for size, smoothing in (([1024, 2048], None), ([2048, 4096], 32.0)):
        settings = {"n_features": None, "image_size": size}
        header = {"settings": settings, "members": [], "calibration": calibration}
        found, _ = upgraded(header, {})
        assert found["settings"] == settings | {"smoothing": smoothing}
        assert found["calibration"]["scoring"] == {"fusion": "product", "smoothing": smoothing}
        assert upgraded(found, {})[0] == found
