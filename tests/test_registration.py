"""A map lies on its image: what is hot is where the defect is, whatever the sizes and aspects."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from npad import NPad
from npad.features.backbone import Backbone, filled, whole_strides


def noise(n: int, size: tuple[int, int], seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(110, 10, (n, *size)).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("model_size", "size"),
    [
        ((64, 64), (64, 64)),
        ((96, 160), (96, 160)),
        ((160, 96), (240, 144)),
        ((96, 128), (301, 403)),
        ((128, 64), (64, 200)),
        ((75, 101), (150, 202)),  # no whole number of any stride
        ((100, 140), (51, 200)),
    ],
)
def test_the_map_peaks_on_a_bright_spot(model_size: tuple[int, int], size: tuple[int, int]) -> None:
    """To half a pixel of the model, by the centre of what is above 0.7 of the peak."""
    model = NPad("filterbank", image_size=model_size, n_centroids=128, progress=False)
    model.fit(noise(12, size, 0)[..., None])
    images = noise(6, size, 1).astype(np.float64)
    rows, columns = np.mgrid[: size[0], : size[1]] + 0.5
    scale = np.array(size) / model_size
    spots = np.random.default_rng(2).uniform(0.25, 0.75, (6, 2)) * size
    for i, (y, x) in enumerate(spots):
        distance = ((rows - y) / scale[0]) ** 2 + ((columns - x) / scale[1]) ** 2
        images[i] += 130 * np.exp(-distance / 8)
    maps = model.predict(images.clip(0, 255).astype(np.uint8)[..., None]).maps
    errors = []
    for map_, spot in zip(maps, spots, strict=True):
        assert map_.shape == size
        top = (map_ - map_.min()) / np.ptp(map_)
        top = np.where(top > 0.7, top - 0.7, 0)
        centre = np.array([(top * rows).sum(), (top * columns).sum()]) / top.sum()
        errors.append((centre - spot) / scale)
    print(np.round(errors, 2), np.round(spots / scale, 0))
    assert np.abs(errors).max() < 0.5
    assert np.abs(np.mean(errors, axis=0)).max() < 0.25


def test_images_are_filled_up_to_whole_strides() -> None:
    x = torch.rand(2, 3, 5, 7)
    found = filled(x, (8, 8))
    assert torch.equal(found[:, :, :5, :7], x)
    assert torch.equal(found[:, :, 5:, :7], x[:, :, 4:].expand(2, 3, 3, 7))
    assert torch.equal(found[..., 7], found[..., 6])
    assert filled(x, (5, 7)) is x
    bank = Backbone("filterbank", (1, 2))
    assert whole_strides([bank], (64, 65)) == (64, 72)
    assert whole_strides([bank, Backbone("filterbank", (4,))], (64, 65)) == (64, 96)


def test_an_older_model_is_not_filled() -> None:
    """Its map covers the image with cells of which the last are not whole, as when it was fitted."""
    images = noise(12, (50, 60), 0)[..., None]
    model = NPad("filterbank", image_size=(50, 60), n_centroids=16, progress=False).fit(images)
    assert model.members_[0].grid == (16, 16)
    old = NPad.load(Path(__file__).parent / "data" / "version_0_1.npad.bin")
    assert (model.filled_, old.filled_) == (True, False)
    assert old.members_[0].grid == (3, 4)  # of 24 x 32 pixels at stride 8
