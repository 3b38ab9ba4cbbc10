"""Fusion, upsampling, smoothing and resizing of anomaly maps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from scipy import ndimage

from npad.anomaly_map import (
    FUSIONS,
    Standardization,
    fuse,
    resize_map,
    smoothing_sigma,
    upsample_and_smooth,
)


def test_product_is_the_weighted_geometric_mean() -> None:
    m, e = torch.tensor([[[4.0, 1.0]]]), torch.tensor([[[9.0, 16.0]]])
    torch.testing.assert_close(fuse(m, e, "product", weight=0.5), torch.tensor([[[6.0, 4.0]]]))
    torch.testing.assert_close(fuse(m, e, "product", weight=1.0), m)
    torch.testing.assert_close(fuse(m, e, "product", weight=0.0), e)
    torch.testing.assert_close(fuse(m, e, "product", weight=0.25), m**0.25 * e**0.75)


def test_sum_standardises_both_maps_with_the_nominal_moments() -> None:
    m, e = torch.rand(3, 4, 5) * 7 + 30, torch.rand(3, 4, 5) * 0.1
    s = Standardization.of(m, e)
    assert s.mahalanobis_mean == pytest.approx(float(m.mean()), rel=1e-6)
    assert s.euclidean_std == pytest.approx(float(e.std()), rel=1e-5)
    fused = fuse(m, e, "sum", weight=0.5, standardization=s)
    expected = ((m - m.mean()) / m.std() + (e - e.mean()) / e.std()) / 2
    torch.testing.assert_close(fused, expected, rtol=1e-4, atol=1e-4)
    only_m = fuse(m, e, "sum", weight=1.0, standardization=s)
    torch.testing.assert_close(only_m, (m - m.mean()) / m.std(), rtol=1e-4, atol=1e-4)


def test_one_map_alone_is_returned_as_it_is() -> None:
    m, e = torch.rand(2, 3, 3), torch.rand(2, 3, 3)
    assert torch.equal(fuse(m, None, "mahalanobis"), m)
    assert torch.equal(fuse(m, e, "euclidean"), e)


def test_fuse_names_what_is_wrong() -> None:
    m = torch.rand(2, 3, 3)
    with pytest.raises(ValueError, match="product, sum, mahalanobis, euclidean, got 'mean'"):
        fuse(m, m, "mean")
    with pytest.raises(ValueError, match=r"weight must be between 0 and 1, got 1\.5"):
        fuse(m, m, "product", weight=1.5)
    with pytest.raises(ValueError, match="standardization"):
        fuse(m, m, "sum")
    with pytest.raises(ValueError, match=r"\(2, 3, 3\) and \(2, 3, 4\)"):
        fuse(m, torch.rand(2, 3, 4), "product")
    for fusion in set(FUSIONS) - {"mahalanobis"}:
        with pytest.raises(ValueError, match="nominal set"):
            fuse(m, None, fusion)


@pytest.mark.parametrize(
    ("grid", "image_size", "sigma"),
    [
        ((32, 32), (256, 256), 4.0),
        ((7, 31), (53, 129), 2.5),
        ((2, 3), (9, 13), 4.0),  # the kernel is wider than the image: mirrored more than once
        ((16, 16), (16, 16), 1.0),
        ((8, 9), (40, 50), 0.0),
    ],
)
def test_smoothing_agrees_with_scipy(
    grid: tuple[int, int], image_size: tuple[int, int], sigma: float
) -> None:
    maps = torch.rand(2, *grid)
    up = F.interpolate(
        maps[None].double(), size=image_size, mode="bilinear", align_corners=False
    ).numpy()[0]
    expected = [ndimage.gaussian_filter(u, sigma, mode="reflect", truncate=4.0) for u in up]
    actual = upsample_and_smooth(maps, image_size, sigma)
    assert actual.dtype == torch.float32
    np.testing.assert_allclose(actual.numpy(), np.stack(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize("value", [0.1, 1 / 3, 12345.678, 0.0])
def test_a_constant_map_stays_exactly_constant(value: float) -> None:
    maps = torch.full((2, 7, 5), value)
    out = upsample_and_smooth(maps, (61, 47), 3.3)
    assert torch.equal(out, torch.full((2, 61, 47), value))


@pytest.mark.parametrize("n_threads", [1, 2])
def test_a_batch_is_bitwise_its_single_images(n_threads: int) -> None:
    torch.set_num_threads(n_threads)
    maps = torch.rand(5, 33, 31)
    batch = upsample_and_smooth(maps, (256, 250), 4.0)
    for i in range(len(maps)):
        assert torch.equal(batch[i : i + 1], upsample_and_smooth(maps[i : i + 1], (256, 250), 4.0))


def test_an_empty_batch_and_strided_maps() -> None:
    assert upsample_and_smooth(torch.rand(0, 4, 4), (16, 16), 1.0).shape == (0, 16, 16)
    maps = torch.rand(2, 6, 4)
    strided = maps.transpose(1, 2).contiguous().transpose(1, 2)
    out = upsample_and_smooth(maps, (24, 16), 1.0)
    torch.testing.assert_close(upsample_and_smooth(strided, (24, 16), 1.0), out)


def test_nan_is_not_hidden() -> None:
    maps = torch.rand(2, 4, 4)
    maps[0, 1, 1] = float("nan")
    out = upsample_and_smooth(maps, (16, 16), 1.0)
    assert out[0].isnan().any()
    assert not out[1].isnan().any()


@pytest.mark.parametrize(("row", "column"), [(0, 0), (5, 11), (16, 8), (31, 31), (20, 3)])
def test_a_point_anomaly_peaks_at_its_own_pixel(row: int, column: int) -> None:
    """A cell is centred on its share of the pixels: a shift of half a cell would be seen here."""
    maps = torch.zeros(1, 32, 32)
    maps[0, row, column] = 1.0
    height, width = 611, 333  # odd, and of another aspect than the model's input
    own = resize_map(upsample_and_smooth(maps, (256, 256), 4.0)[0], (height, width))
    assert own.shape == (height, width)
    centre = own.double() / own.double().sum()
    y = float((centre.sum(1) * (torch.arange(height) + 0.5)).sum())
    x = float((centre.sum(0) * (torch.arange(width) + 0.5)).sum())
    peak = divmod(int(own.argmax()), width)
    expected = ((row + 0.5) * height / 32, (column + 0.5) * width / 32)
    if 3 < row < 28 and 3 < column < 28:  # away from the border the map is symmetric
        assert (y, x) == pytest.approx(expected, abs=0.02)
    if 0 < row < 31 and 0 < column < 31:
        assert abs(peak[0] + 0.5 - expected[0]) <= height / 256 + 0.5
        assert abs(peak[1] + 0.5 - expected[1]) <= width / 256 + 0.5
    else:  # a mirrored border draws the peak onto itself
        assert abs(peak[0] + 0.5 - expected[0]) <= height / 64
        assert abs(peak[1] + 0.5 - expected[1]) <= width / 64


@pytest.mark.parametrize("axis", [1, 2])
def test_flips_commute(axis: int) -> None:
    maps = torch.rand(2, 13, 8)
    flipped = upsample_and_smooth(maps.flip(axis), (101, 67), 2.0)
    expected = upsample_and_smooth(maps, (101, 67), 2.0).flip(axis)
    torch.testing.assert_close(flipped, expected, rtol=0, atol=1e-6)


def test_rotations_commute() -> None:
    maps = torch.rand(2, 13, 8)
    rotated = upsample_and_smooth(maps.rot90(1, (1, 2)), (67, 101), 2.0)
    expected = upsample_and_smooth(maps, (101, 67), 2.0).rot90(1, (1, 2))
    torch.testing.assert_close(rotated, expected, rtol=0, atol=1e-6)
    own = resize_map(maps[0].rot90(), (90, 71))
    torch.testing.assert_close(own, resize_map(maps[0], (71, 90)).rot90(), rtol=0, atol=1e-6)


def test_smoothing_follows_the_shorter_side() -> None:
    assert smoothing_sigma((256, 256)) == 4.0
    assert smoothing_sigma((512, 1024)) == smoothing_sigma((1024, 512)) == 8.0


def test_bad_shapes_and_sigma() -> None:
    with pytest.raises(ValueError, match=r"\(N, h, w\), got \(4, 4\)"):
        upsample_and_smooth(torch.rand(4, 4), (8, 8), 1.0)
    for sigma in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="sigma must be 0 or more"):
            upsample_and_smooth(torch.rand(1, 4, 4), (8, 8), sigma)
    with pytest.raises(ValueError, match=r"\(H, W\), got \(1, 4, 4\)"):
        resize_map(torch.rand(1, 4, 4), (8, 8))
