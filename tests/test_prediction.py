"""What a prediction holds: maps at the size that was asked for, and images as they were decoded."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
import torch
from image_files import save_image, smooth_pixels
from PIL import Image

from npad import NPad, ops
from npad.images import ImageSource, decoding, read_image

SIZE = (32, 48)
SIZES = [(32, 48), (20, 31), (75, 50), (32, 48), (64, 96)]
WRONG = ["images", "", None, 32, (32,), (0, 5), (5, -1), (2.5, 5), ("5", "5"), (1, 2, 3)]
WRONG += [(True, True), (5, True), np.array([5, 5]), np.array(["image"])]


@pytest.fixture(scope="module")
def model() -> NPad:
    images = np.stack([smooth_pixels(*SIZE, seed=i) for i in range(6)])
    return NPad("filterbank", image_size=SIZE, n_centroids=50, batch_size=3, progress=False).fit(
        images
    )


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    return [smooth_pixels(*size, seed=10 + i) for i, size in enumerate(SIZES)]


@pytest.fixture(scope="module")
def own_maps(model: NPad, images: list[np.ndarray]) -> torch.Tensor:
    """Maps at the model's size, batched as `predict_batches` does."""
    source = ImageSource(images, image_size=SIZE, batch_size=3)
    return torch.cat([model.score(batch.images)[1] for batch in source.batches()])


def test_maps_of_the_models_size_are_not_resized(
    model: NPad, images: list[np.ndarray], own_maps: torch.Tensor
) -> None:
    prediction = model.predict(images, map_size="model")
    assert np.array_equal(np.stack(prediction.maps), own_maps.numpy())
    assert prediction.sizes == SIZES
    one_weight = copy.copy(model).set_params(map_weight=model.fusion_weight)
    prediction = one_weight.predict(images, map_size="model")  # all layers make the score, too
    assert np.array_equal(prediction.scores, np.stack(prediction.maps).max((1, 2)).astype(float))


@pytest.mark.parametrize("size", [(7, 100), (1, 1), SIZE, (np.int64(7), np.int32(9))])
def test_maps_of_one_size(
    model: NPad, images: list[np.ndarray], own_maps: torch.Tensor, size: tuple[int, int]
) -> None:
    prediction = model.predict(images, map_size=size)
    expected = ops.resize_maps(own_maps, [size] * len(images)).view(-1, *size)
    assert np.array_equal(np.stack(prediction.maps), expected.numpy())
    assert prediction.sizes == SIZES
    assert np.array_equal(prediction.scores, model.predict(images).scores)


def test_maps_of_the_images_sizes(
    model: NPad, images: list[np.ndarray], own_maps: torch.Tensor
) -> None:
    flat = ops.resize_maps(own_maps, SIZES)
    for prediction in (model.predict(images), model.predict(images, map_size="image")):
        assert [map_.shape for map_ in prediction.maps] == prediction.sizes == SIZES
        assert np.array_equal(np.concatenate([m.ravel() for m in prediction.maps]), flat.numpy())


@pytest.mark.parametrize("map_size", WRONG)
@pytest.mark.parametrize("method", ["predict", "predict_batches"])
def test_a_size_that_no_map_can_have_is_refused_at_once(
    method: str, map_size: Any, model: NPad, images: list[np.ndarray]
) -> None:
    with pytest.raises(ValueError, match=r"NPad: map_size must be 'image', 'model' or a positive"):
        getattr(model, method)(images, map_size=map_size)  # nothing is taken from the iterator


def rgb(folder: Path) -> Path:
    return save_image(folder / "rgb.jpg", smooth_pixels(40, 30))


def grey(folder: Path) -> Path:
    return save_image(folder / "grey.png", smooth_pixels(40, 30)[..., 0])


def grey_16_bit(folder: Path) -> Path:
    return save_image(folder / "grey16.png", np.uint16(257) * smooth_pixels(40, 30)[..., 0])


def floating(folder: Path) -> Path:
    pixels = smooth_pixels(*SIZE)[..., 0] / np.float32(255)
    return save_image(folder / "floating.tiff", pixels)


def palette(folder: Path) -> Path:
    path = folder / "palette.png"
    Image.fromarray(smooth_pixels(40, 30)).quantize(16).save(path)
    return path


def alpha(folder: Path) -> Path:
    return save_image(folder / "alpha.png", smooth_pixels(*SIZE, channels=4))


def turned(folder: Path) -> Path:
    exif = Image.Exif()
    exif[0x0112] = 6  # a camera that was held upright
    return save_image(folder / "turned.jpg", smooth_pixels(40, 30), exif=exif)


FILES = [rgb, grey, grey_16_bit, floating, palette, alpha, turned]


@pytest.mark.parametrize("make", FILES)
def test_kept_images_are_those_that_are_read(
    make: Callable[[Path], Path], model: NPad, tmp_path: Path
) -> None:
    path = make(tmp_path)
    prediction = model.predict(path, keep_images=True)
    (kept,), expected = prediction.images, read_image(path)
    assert kept.dtype == expected.dtype
    assert np.array_equal(kept, expected)
    assert prediction.sizes == [kept.shape[:2]]
    assert (kept.shape[:2] == (30, 40)) is (make is turned)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float16, np.float32, np.float64])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_kept_images_of_arrays(
    channels: int, dtype: type[np.generic], model: NPad, tmp_path: Path
) -> None:
    pixels = smooth_pixels(40, 30, channels)
    if dtype is np.uint16:
        array = pixels * np.uint16(257)
    else:
        array = pixels if dtype is np.uint8 else (pixels / 255).astype(dtype)
    (kept,) = model.predict(array, keep_images=True).images
    colours = array[..., :3] if channels > 1 else np.repeat(array, 3, axis=2)
    expected = colours / np.float32(65535) if dtype is np.uint16 else colours
    assert kept.dtype == (np.uint8 if dtype is np.uint8 else np.float32)
    assert np.array_equal(kept, expected.astype(kept.dtype))
    assert not np.shares_memory(kept, array)  # a camera may fill its buffer again


def test_images_are_kept_only_where_that_is_asked(
    model: NPad, images: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = []
    original = ImageSource.batches

    def seen(self: ImageSource) -> Any:
        for batch in original(self):
            batches.append(batch)
            yield batch

    monkeypatch.setattr(ImageSource, "batches", seen)
    assert model.predict(images).images == []
    assert [batch.pixels for batch in batches] == [[], []]
    kept = list(model.predict_batches(images, keep_images=True))
    assert [len(part.images) for part in kept] == [3, 2]
    for image, given in zip([i for part in kept for i in part.images], images, strict=True):
        assert np.array_equal(image, given)


def test_each_file_is_decoded_once(
    model: NPad, images: list[np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [save_image(tmp_path / f"{i}.png", image) for i, image in enumerate(images)]
    (tmp_path / "2.png").write_bytes(b"no image")
    opened: list[Path] = []
    find_reader = decoding.find_reader

    def count(file: BinaryIO, name: str) -> Any:
        opened.append(Path(name))
        return find_reader(file, name)

    monkeypatch.setattr(decoding, "find_reader", count)
    prediction = model.predict(paths, keep_images=True, skip_bad=True, map_size="image")
    assert sorted(opened) == paths
    good = [i for i in range(len(paths)) if i != 2]
    assert prediction.paths == [str(paths[i]) for i in good]
    assert [path for path, _ in prediction.skipped] == [str(paths[2])]
    assert prediction.sizes == [SIZES[i] for i in good]
    for kept, i in zip(prediction.images, good, strict=True):
        assert np.array_equal(kept, images[i])
