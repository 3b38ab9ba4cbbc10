"""anomaly_map: fusion, upsampling, smoothing and score; and what npad.anomaly_map decides of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from accuracy import assert_accurate
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from torch import Tensor

from npad import ops
from npad.members import Member
from npad.ops import reference
from npad.scoring.fusion import (
    FUSIONS,
    Standardization,
    fusion_arguments,
    joined,
    resized,
)

ALONE = (False, (1.0, 0.0, 0.0))  # the Mahalanobis map as it is
SHAPES = [
    ((32, 32), (256, 256), 4.0),
    ((7, 31), (53, 129), 2.5),
    ((2, 3), (9, 13), 4.0),  # the kernel is wider than the image: mirrored more than once
    ((1, 1), (17, 5), 3.0),
    ((16, 16), (16, 16), 1.0),
    ((33, 20), (17, 64), 0.7),  # fewer rows than the grid has
    ((8, 9), (40, 50), 0.0),
    ((20, 24), (160, 193), 7.0),
]


def smooth(maps: Tensor, size: tuple[int, int], sigma: float) -> Tensor:
    return ops.anomaly_map(maps, None, *ALONE, size, sigma)[0]


def fuse(*args: object, **kwargs: object) -> Tensor:
    """The fused map itself: neither upsampled nor smoothed."""
    m, e, *fusion = fusion_arguments(*args, **kwargs)
    size = tuple((e if m is None else m).shape[1:])
    return ops.anomaly_map(m, e, *fusion, size, 0.0)[0]


@pytest.mark.parametrize(
    ("product", "coefficients"),
    [(True, (0.4, 0.6, 0.0)), (True, (2.0, -0.5, 1.0)), (False, (0.3, -0.7, 2.0)), ALONE],
    ids=["product", "powers", "sum", "alone"],
)
@pytest.mark.parametrize(("grid", "size", "sigma"), SHAPES)
def test_against_reference(
    isa: str,
    grid: tuple[int, int],
    size: tuple[int, int],
    sigma: float,
    product: bool,
    coefficients: tuple[float, float, float],
) -> None:
    m, e = 0.1 + 30 * torch.rand(3, *grid), 0.1 + torch.rand(3, *grid)
    rest = product, coefficients, size, sigma
    actual = ops.anomaly_map(m, e, *rest)
    working = reference.anomaly_map(m, e, *rest)
    oracle = reference.anomaly_map(m.double(), e.double(), *rest)
    for a, w, o in zip(actual, working, oracle, strict=True):
        assert_accurate(a, w, o)
    assert torch.equal(actual[1], actual[0].amax((1, 2)))


@given(
    m=st.floats(0, torch.finfo(torch.float32).max, width=32),
    e=st.floats(0, torch.finfo(torch.float32).max, width=32),
    a=st.floats(0, 2),
    b=st.floats(-1, 1),
)
@settings(max_examples=300, deadline=None)
def test_powers_are_right_to_the_last_bit_but_one(m: float, e: float, a: float, b: float) -> None:
    """Zeros, subnormals, overflow and underflow too; 0^0 is 1."""
    maps = [torch.tensor([[[1.0, value, 2.0]]]) for value in (m, e)]
    fused = (maps[0].double() ** a * maps[1].double() ** b).float()
    if not fused.isfinite().all():
        fused.fill_(torch.nan)
    actual, _ = ops.anomaly_map(*maps, True, (a, b, 0.0), (1, 3), 0.0)
    torch.testing.assert_close(
        actual, fused, rtol=2e-7, atol=2e-7 * float(fused.nan_to_num().max()), equal_nan=True
    )


def test_band_is_the_matrix_of_both_steps() -> None:
    for n, size, sigma in [(32, 256, 4.0), (3, 13, 4.0), (1, 5, 2.0), (20, 64, 0.0), (33, 17, 0.7)]:
        first, taps = reference.axis_band(n, size, sigma)
        dense = torch.zeros(size, n)
        for i in range(size):
            dense[i, first[i] : first[i] + taps.shape[1]] = taps[i]
        identity = torch.eye(n, dtype=torch.float64)[None]
        upsample = F.interpolate(identity, size=size, mode="linear", align_corners=False)[0].T
        expected = reference.gaussian_matrix(size, sigma) @ upsample
        torch.testing.assert_close(dense.double(), expected, rtol=1e-6, atol=1e-9)
    assert reference.axis_band(32, 256, 4.0)[1].shape[1] == 6


def test_product_is_the_weighted_geometric_mean() -> None:
    m, e = torch.tensor([[[4.0, 1.0]]]), torch.tensor([[[9.0, 16.0]]])
    torch.testing.assert_close(fuse(m, e, "product", weight=0.5), torch.tensor([[[6.0, 4.0]]]))
    torch.testing.assert_close(fuse(m, e, "product", weight=1.0), m)
    torch.testing.assert_close(fuse(m, e, "product", weight=0.0), e)
    torch.testing.assert_close(fuse(m, e, "product", weight=0.25), m**0.25 * e**0.75)


def test_sum_standardises_both_maps_with_the_nominal_moments() -> None:
    m, e = torch.rand(3, 4, 5) * 7 + 30, torch.rand(3, 4, 5) * 0.1
    moments = [Standardization.of(x) for x in (m, e)]
    assert moments[0].mean == pytest.approx(float(m.mean()), rel=1e-6)
    assert moments[1].std == pytest.approx(float(e.std()), rel=1e-5)
    fused = fuse(m, e, "sum", weight=0.5, moments=moments)
    expected = ((m - m.mean()) / m.std() + (e - e.mean()) / e.std()) / 2
    torch.testing.assert_close(fused, expected, rtol=1e-4, atol=1e-4)
    only_m = fuse(m, e, "sum", weight=1.0, moments=moments)
    torch.testing.assert_close(only_m, (m - m.mean()) / m.std(), rtol=1e-4, atol=1e-4)


def test_one_map_alone_is_returned_as_it_is() -> None:
    m, e = torch.rand(2, 3, 3), torch.rand(2, 3, 3)
    assert torch.equal(fuse(m, None, "mahalanobis"), m)
    assert torch.equal(fuse(m, e, "euclidean"), e)
    assert fusion_arguments(m, e, "mahalanobis")[1] is None  # what is not used is not read


def test_fusion_names_what_is_wrong() -> None:
    m = torch.rand(2, 3, 3)
    with pytest.raises(ValueError, match="product, sum, mahalanobis, euclidean, got 'mean'"):
        fusion_arguments(m, m, "mean")
    with pytest.raises(ValueError, match=r"weight must be between 0 and 1, got 1\.5"):
        fusion_arguments(m, m, "product", weight=1.5)
    with pytest.raises(ValueError, match="needs standardization"):
        fusion_arguments(m, m, "sum")
    flat = Standardization(1.0, 0.0), Standardization(1.0, 2.0)
    with pytest.raises(ValueError, match=r"standard deviations above 0, got 0\.0 and 2\.0"):
        fusion_arguments(m, m, "sum", moments=flat)
    with pytest.raises(ValueError, match="needs the Mahalanobis map"):
        fusion_arguments(None, m, "product")
    for fusion in set(FUSIONS) - {"mahalanobis"}:
        with pytest.raises(ValueError, match="nominal set"):
            fusion_arguments(m, None, fusion)


def test_several_of_a_kind_come_to_one() -> None:
    """Their geometric mean on the finest grid, which no unit can tilt."""
    fine, coarse, e = 0.5 + torch.rand(2, 6, 4), 0.5 + torch.rand(2, 3, 2), torch.rand(2, 6, 4)
    up = F.interpolate(coarse[:, None], size=(6, 4), mode="bilinear", align_corners=False)[:, 0]
    of_map = Member(0, (1,), in_score=False)
    found = joined(
        [
            (Member(0, (2,)), {"mahalanobis": coarse}),
            (of_map, {"mahalanobis": 100 * fine}),
            (Member(0, (2, 3)), {"euclidean": e}),
        ]
    )
    assert found["mahalanobis_score"] is coarse
    torch.testing.assert_close(found["mahalanobis_map"], 10 * (fine * up).sqrt())
    assert found["euclidean"] is e
    fused = fuse(found["mahalanobis_score"], e, "product", 0.3)
    torch.testing.assert_close(fused, up**0.3 * e**0.7, rtol=1e-4, atol=1e-5)
    prefix = joined([(Member(0, (2, 1), prefix=3), {"mahalanobis_prefix": fine, "mahalanobis": e})])
    assert prefix["mahalanobis_score"] is fine
    assert prefix["mahalanobis_map"] is e
    alone = joined(
        [(Member(0, (2,)), {"mahalanobis": fine}), (Member(1, (2,)), {"mahalanobis": e})]
    )
    assert alone["mahalanobis_score"] is alone["mahalanobis_map"]


@pytest.mark.parametrize(("grid", "image_size", "sigma"), SHAPES)
def test_smoothing_agrees_with_scipy(
    isa: str, grid: tuple[int, int], image_size: tuple[int, int], sigma: float
) -> None:
    maps = torch.rand(2, *grid)
    up = F.interpolate(
        maps[None].double(), size=image_size, mode="bilinear", align_corners=False
    ).numpy()[0]
    expected = [ndimage.gaussian_filter(u, sigma, mode="reflect", truncate=4.0) for u in up]
    actual = smooth(maps, image_size, sigma)
    assert actual.dtype == torch.float32
    np.testing.assert_allclose(actual.numpy(), np.stack(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize("value", [0.1, 1 / 3, 12345.678, 0.0])
def test_a_constant_map_stays_exactly_constant(isa: str, value: float) -> None:
    maps = torch.full((2, 7, 5), value)
    out = smooth(maps, (61, 47), 3.3)
    assert torch.equal(out, torch.full((2, 61, 47), value))
    out, scores = ops.anomaly_map(maps, 3 * maps, True, (0.4, 0.6, 0.0), (61, 47), 3.3)
    assert (out == out[0, 0, 0]).all()
    assert torch.equal(scores, out[:, 0, 0])


def test_batches_threads_and_rerun_give_the_same_bits(isa: str) -> None:
    m, e = torch.rand(5, 33, 31), torch.rand(5, 33, 31)
    rest = True, (0.4, 0.6, 0.0), (256, 250), 4.0
    torch.set_num_threads(1)
    maps, scores = ops.anomaly_map(m, e, *rest)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for _ in range(2):
            again = ops.anomaly_map(m, e, *rest)
            assert torch.equal(again[0], maps)
            assert torch.equal(again[1], scores)
        for i in range(5):
            alone = ops.anomaly_map(m[i : i + 1], e[i : i + 1], *rest)
            assert torch.equal(alone[0], maps[i : i + 1])
            assert torch.equal(alone[1], scores[i : i + 1])


def test_an_empty_batch_and_strided_maps(isa: str) -> None:
    maps, scores = ops.anomaly_map(torch.rand(0, 4, 4), None, *ALONE, (16, 16), 1.0)
    assert maps.shape == (0, 16, 16)
    assert scores.shape == (0,)
    maps = torch.rand(2, 6, 4)
    strided = maps.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(smooth(strided, (24, 16), 1.0), smooth(maps, (24, 16), 1.0))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("product", [True, False])
def test_what_is_not_finite_fills_its_map_and_no_other(
    isa: str, product: bool, value: float
) -> None:
    m, e = torch.rand(3, 5, 4), torch.rand(3, 5, 4)
    rest = product, (0.4, 0.6, 0.0), (16, 19), 1.0
    expected, peaks = ops.anomaly_map(m, e, *rest)
    m[0, 4, 3] = e[2, 0, 0] = value
    for actual, scores in (ops.anomaly_map(m, e, *rest), reference.anomaly_map(m, e, *rest)):
        assert actual[[0, 2]].isnan().all()
        assert scores.isnan().tolist() == [True, False, True]
        torch.testing.assert_close(actual[1], expected[1])
        torch.testing.assert_close(scores[1], peaks[1])


@pytest.mark.parametrize(("row", "column"), [(0, 0), (5, 11), (16, 8), (31, 31), (20, 3)])
def test_a_point_anomaly_peaks_at_its_own_pixel(row: int, column: int) -> None:
    """A cell is centred on its share of the pixels: a shift of half a cell would be seen here."""
    maps = torch.zeros(1, 32, 32)
    maps[0, row, column] = 1.0
    height, width = 611, 333  # odd, and of another aspect than the model's input
    own = torch.from_numpy(resized(smooth(maps, (256, 256), 4.0), [(height, width)])[0])
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
    flipped = smooth(maps.flip(axis), (101, 67), 2.0)
    expected = smooth(maps, (101, 67), 2.0).flip(axis)
    torch.testing.assert_close(flipped, expected, rtol=0, atol=1e-6)


def test_rotations_commute() -> None:
    maps = torch.rand(2, 13, 8)
    rotated = smooth(maps.rot90(1, (1, 2)), (67, 101), 2.0)
    expected = smooth(maps, (101, 67), 2.0).rot90(1, (1, 2))
    torch.testing.assert_close(rotated, expected, rtol=0, atol=1e-6)
    (own,) = resized(maps[:1].rot90(1, (1, 2)), [(90, 71)])
    (expected,) = resized(maps[:1], [(71, 90)])
    np.testing.assert_allclose(own, np.rot90(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize("alone", [True, False])
def test_opcheck(alone: bool) -> None:
    m, e = torch.rand(2, 4, 5), torch.rand(2, 4, 5)
    torch.library.opcheck(
        torch.ops.npad.anomaly_map.default,
        (None if alone else m, e, True, (0.4, 0.6, 0.0), (16, 20), 1.0),
    )


def test_rejects() -> None:
    m = torch.rand(2, 4, 5)
    with pytest.raises(ValueError, match=r"anomaly_map: mahalanobis and euclidean are both None"):
        ops.anomaly_map(None, None, *ALONE, (8, 8), 1.0)
    with pytest.raises(TypeError, match="euclidean must be float32, got float64"):
        ops.anomaly_map(m, m.double(), *ALONE, (8, 8), 1.0)
    for bad in (torch.rand(4, 4), torch.rand(1, 0, 4)):
        with pytest.raises(ValueError, match=r"\(N, h, w\) with h, w >= 1, got "):
            ops.anomaly_map(bad, None, *ALONE, (8, 8), 1.0)
    with pytest.raises(ValueError, match=r"\(N, h, w\) = \(2, 4, 5\), got \(2, 5, 4\)"):
        ops.anomaly_map(m, m.mT, *ALONE, (8, 8), 1.0)
    with pytest.raises(ValueError, match="euclidean is on meta but mahalanobis is on cpu"):
        ops.anomaly_map(m, m.to("meta"), *ALONE, (8, 8), 1.0)
    with pytest.raises(ValueError, match="coefficients must be finite"):
        ops.anomaly_map(m, m, False, (1.0, float("inf"), 0.0), (8, 8), 1.0)
    with pytest.raises(ValueError, match=r"size must be at least \(1, 1\), got \(0, 8\)"):
        ops.anomaly_map(m, m, *ALONE, (0, 8), 1.0)
    for sigma in (-1.0, 9.5, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="sigma must be 0 to 9 pixels, got"):
            ops.anomaly_map(m, m, *ALONE, (9, 8), sigma)
