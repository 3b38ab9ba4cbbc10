"""Transformers: default layers and size of images, the grid of tokens, a model from end to end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from fake_model import write_category
from safetensors.torch import save_file

from npad import NPad
from npad import model_file as files
from npad.evaluation.datasets import find_categories
from npad.evaluation.measure import evaluate
from npad.features.backbone import Backbone
from npad.features.catalog import sketch
from npad.model_file import ModelFileError

TINY = "test_vit"  # 64 channels, 6 blocks, patches of 16


def random_weights(path: Path, name: str, **options: Any) -> Path:
    torch.manual_seed(5)
    save_file(timm.create_model(name, **options).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_weights(tmp_path_factory.mktemp("weights") / "tiny.safetensors", TINY)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(2).integers(90, 130, (6, 96, 80, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def fitted(tiny: Path, images: np.ndarray) -> NPad:
    return NPad(TINY, weights=tiny, n_centroids=200, progress=False).fit(images)


@pytest.mark.parametrize(
    ("name", "layers", "side", "grid"),
    [
        ("vit_small_patch16_224", (5, 8), 384, 24),
        ("vit_base_patch16_224", (5, 8), 224, 14),
        ("deit_tiny_distilled_patch16_224", (5, 8), 512, 32),
        ("eva02_tiny_patch14_336", (5, 8), 504, 36),
        ("vit_small_patch14_reg4_dinov2", (5, 8), 336, 24),
        ("vit_small_patch16_dinov3", (5, 8), 384, 24),
        ("cait_xxs24_224", (11, 17), 224, 14),  # takes no size but its own
        ("swin_tiny_patch4_window7_224", (1, 2), 256, 32),  # hierarchical: as a ResNet
        ("convmixer_768_32", (15, 23), 256, 36),  # one reduction, but convolutions
        ("resnet18", (2, 3), 256, 32),
        ("filterbank", (1, 2, 3), 256, 64),
    ],
)
def test_defaults_of_each_family(name: str, layers: tuple[int, ...], side: int, grid: int) -> None:
    if name not in ["filterbank", *timm.list_models()]:
        pytest.skip(f"timm {timm.__version__} does not have it")
    found = sketch(name)
    assert (found.layers, found.image_size, found.grid) == (layers, (side, side), (grid, grid))


@pytest.mark.parametrize(
    ("name", "n_prefix"),
    [
        ("vit_tiny_patch16_224", 1),
        ("deit_tiny_distilled_patch16_224", 2),
        ("vit_small_patch14_reg4_dinov2", 5),
        ("vit_small_patch16_dinov3", 5),
    ],
)
def test_tokens_that_are_no_patches_are_left_out(name: str, n_prefix: int, tmp_path: Path) -> None:
    """Against the tokens that come out of the block itself, those of no patch at the front."""
    if name not in timm.list_models():
        pytest.skip(f"timm {timm.__version__} does not have it")
    options = {"features_only": True, "out_indices": [1]}
    file = random_weights(tmp_path / "weights.safetensors", name, **options)
    backbone = Backbone(name, layers=[1], weights=file)
    patch = backbone.net.feature_info.reduction()[0]
    tokens: list[torch.Tensor] = []
    hook = backbone.net.model.blocks[1].register_forward_hook(lambda *x: tokens.append(x[2]))
    (level,) = backbone.levels(torch.rand(1, 3, 3 * patch, 5 * patch))
    hook.remove()
    assert tokens[-1].shape[1] == n_prefix + 3 * 5
    patches = tokens[-1][:, n_prefix:].reshape(1, 3, 5, -1)
    assert torch.equal(level, patches.permute(0, 3, 1, 2))


def test_the_default_size_does_not_depend_on_the_layers(tiny: Path) -> None:
    sizes = {Backbone(TINY, layers=k, weights=tiny).default_size for k in ([0], [2, 5], None)}
    assert sizes == {(512, 512)}


def test_a_fit_finds_the_size_and_the_model_keeps_it(
    fitted: NPad, images: np.ndarray, tiny: Path, tmp_path: Path
) -> None:
    fresh = NPad(TINY, weights=tiny)
    assert fresh.settings()["image_size"] is None
    assert fresh.input_size() == fitted.input_size() == (512, 512)
    assert fitted.get_params()["image_size"] is None
    assert fitted.settings()["image_size"] == [512, 512]
    assert {member.grid for member in fitted.members_} == {(32, 32)}
    assert fresh.embed(images[:1]).shape == fitted.embed(images[:1]).shape == (1, 32, 32, 128)
    with pytest.raises(ValueError, match=r"\(B, 3, 512, 512\), got \(1, 3, 256, 256\)"):
        fitted.score(torch.rand(1, 3, 256, 256))

    fitted.save(tmp_path / "model.npad")
    again = NPad.load(tmp_path / "model.npad", progress=False)
    assert again.settings() == fitted.settings()
    expected, found = fitted.predict(images), again.predict(images)
    assert np.array_equal(found.scores, expected.scores)
    assert all(map(np.array_equal, found.maps, expected.maps))


def test_the_map_is_hot_where_the_defect_is(fitted: NPad, images: np.ndarray) -> None:
    size = images.shape[1:3]
    for row, column in [(0, 0), (40, 24), (84, 66)]:
        image = images[0].copy()
        image[row : row + 12, column : column + 14] = 255
        prediction = fitted.predict([image])
        (map_,) = prediction.maps
        assert map_.shape == size
        peak = np.unravel_index(int(np.argmax(map_)), size)
        reach = np.array(size) / 32  # one patch
        assert (np.array([row, column]) - reach <= peak).all()
        assert (peak <= np.array([row + 12, column + 14]) + reach).all()
        assert prediction.scores[0] > fitted.predict(images).scores.max()


def test_it_is_evaluated_at_the_size_that_it_finds(tiny: Path, tmp_path: Path) -> None:
    tests = [("good", "000", 0, 1), ("spot", "000", 120, 1)]
    (category,) = find_categories(write_category(tmp_path / "part", tests))
    model = NPad(TINY, weights=tiny, n_centroids=50, progress=False)
    result = evaluate(model, category, progress=False)
    assert result.metric_size == (512, 512)
    assert result.settings["image_size"] == [512, 512]
    assert result.metrics["pixel_auroc"] > 0.9


def test_without_tokens_the_default_is_256_bit_for_bit(images: np.ndarray) -> None:
    small: dict[str, Any] = {"n_centroids": 30, "progress": False}
    scores = [
        NPad("filterbank", **size, **small).fit(images).predict(images).scores
        for size in ({}, {"image_size": 256})
    ]
    assert np.array_equal(*scores)


def test_a_model_file_must_know_its_size(fitted: NPad, tmp_path: Path) -> None:
    path = tmp_path / "model.npad"
    fitted.save(path)
    header, tensors = files.read_model(path)
    header["settings"]["image_size"] = None
    files.write_model(path, header, tensors)
    with pytest.raises(ModelFileError, match=r"header that this npad cannot use .*image_size"):
        NPad.load(path)


def test_a_size_that_is_no_multiple_of_the_patch(tiny: Path, images: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"image_size \(250, 256\) does not work .*divisible"):
        NPad(TINY, weights=tiny, image_size=(250, 256), progress=False).fit(images)
