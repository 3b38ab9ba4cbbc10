"""A map lies on its image: what is hot is where the defect is, whatever the sizes and aspects."""

from __future__ import annotations

import numpy as np
import pytest

from npad import NPad


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
        ((75, 101), (150, 202)),
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
    for image, (y, x) in zip(images, spots, strict=True):
        distance = ((rows - y) / scale[0]) ** 2 + ((columns - x) / scale[1]) ** 2
        image += 130 * np.exp(-distance / 8)
    maps = model.predict(images.clip(0, 255).astype(np.uint8)[..., None]).maps
    errors = []
    for map_, spot in zip(maps, spots, strict=True):
        assert map_.shape == size
        top = (map_ - map_.min()) / np.ptp(map_)
        top = np.where(top > 0.7, top - 0.7, 0)
        centre = np.array([(top * rows).sum(), (top * columns).sum()]) / top.sum()
        errors.append((centre - spot) / scale)
    assert np.abs(errors).max() < 0.5
    assert np.abs(np.mean(errors, axis=0)).max() < 0.25
