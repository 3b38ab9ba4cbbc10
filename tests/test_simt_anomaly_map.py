"""csrc/cuda/anomaly_map.cu and resize_maps.cu on the CPU emulator."""

from __future__ import annotations

from ctypes import c_double

import pytest
import torch
from accuracy import assert_accurate
from simt_device import SM86, SM90, LaunchError, Simt, load
from torch import Tensor

from npad.ops import reference

PRODUCT, SUM, ALONE = (True, (0.4, 0.6, 0.5)), (False, (0.3, -0.7, 2.0)), (False, (1.0, 0.0, 0.0))


@pytest.fixture(params=["simt_fast", "simt_fma", "simt_checked"])
def simt(request: pytest.FixtureRequest) -> Simt:
    return load(request.param)


def run(
    simt: Simt,
    m: Tensor | None,
    e: Tensor | None,
    product: bool,
    coefficients: tuple[float, float, float],
    size: tuple[int, int],
    sigma: float,
) -> tuple[Tensor, Tensor]:
    x = e if m is None else m
    assert x is not None
    n, h, w = x.shape
    rows, columns = reference.axis_band(h, size[0], sigma), reference.axis_band(w, size[1], sigma)
    maps, scores = torch.full((n, *size), torch.nan), torch.full((n,), torch.nan)
    simt(
        "anomaly_map", 0 if m is None else m, 0 if e is None else e, int(product),
        *map(c_double, coefficients), n, h, w, *rows, rows[1].shape[1], *columns,
        columns[1].shape[1], *size, simt.workspace("anomaly_map", n, h, w), maps, scores,
    )  # fmt: skip
    return maps, scores


@pytest.mark.parametrize("fusion", [PRODUCT, SUM, ALONE], ids=["product", "sum", "alone"])
@pytest.mark.parametrize(
    ("n", "grid", "size", "sigma"),
    [
        (2, (7, 5), (53, 40), 2.5),
        (1, (2, 3), (9, 13), 4.0),
        (3, (1, 1), (8, 5), 1.0),
        (1, (33, 20), (17, 64), 0.7),
        (1, (5, 33), (8, 264), 0.0),  # more columns than a block has threads
        (2, (41, 51), (43, 60), 1.0),  # three parts of a grid
    ],
)
def test_against_reference(
    simt: Simt,
    n: int,
    grid: tuple[int, int],
    size: tuple[int, int],
    sigma: float,
    fusion: tuple[bool, tuple[float, float, float]],
) -> None:
    m, e = 0.1 + 30 * torch.rand(n, *grid), 0.1 + torch.rand(n, *grid)
    actual = run(simt, m, e, *fusion, size, sigma)
    working = reference.anomaly_map(m, e, *fusion, size, sigma)
    oracle = reference.anomaly_map(m.double(), e.double(), *fusion, size, sigma)
    for a, w, o in zip(actual, working, oracle, strict=True):
        assert_accurate(a, w, o)
    assert torch.equal(actual[1], actual[0].amax((1, 2)))


def test_a_wide_grid_takes_shared_memory() -> None:
    """Eight floats for each of its columns."""
    m = torch.rand(1, 2, 3200)
    arguments = (m, None, False, (1.0, 0.0, 0.0), (3, 3200), 0.0)
    actual = run(load("simt_fast", SM90), *arguments)
    for a, e in zip(actual, reference.anomaly_map(*arguments), strict=True):
        torch.testing.assert_close(a, e)
    with pytest.raises(LaunchError, match="cudaError 1"):
        run(load("simt_fast", SM86), *arguments)


def test_one_map_alone(simt: Simt) -> None:
    m = torch.rand(2, 5, 7)
    maps, scores = run(simt, m, None, *ALONE, (5, 7), 0.0)
    assert torch.equal(maps, m)
    assert torch.equal(scores, m.amax((1, 2)))
    maps, _ = run(simt, None, m, True, (0.4, 2.0, 0.0), (5, 7), 0.0)
    torch.testing.assert_close(maps, m**2)


@pytest.mark.parametrize("value", [0.1, 1 / 3, 12345.678, 0.0, -2.5])
def test_a_constant_map_stays_exactly_constant(simt: Simt, value: float) -> None:
    maps, scores = run(simt, torch.full((2, 7, 5), value), None, *ALONE, (41, 27), 3.3)
    assert torch.equal(maps, torch.full((2, 41, 27), value))
    assert torch.equal(scores, torch.full((2,), value))


def test_a_batch_is_bitwise_its_single_images(simt: Simt) -> None:
    m, e = torch.rand(3, 9, 6), torch.rand(3, 9, 6)
    maps, scores = run(simt, m, e, *PRODUCT, (30, 41), 2.0)
    for i in range(3):
        alone = run(simt, m[i : i + 1].clone(), e[i : i + 1].clone(), *PRODUCT, (30, 41), 2.0)
        assert torch.equal(alone[0][0], maps[i])
        assert torch.equal(alone[1][0], scores[i])


@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf")])
def test_what_is_not_finite_fills_its_map_and_no_other(simt: Simt, value: float) -> None:
    m, e = torch.rand(3, 40, 30), torch.rand(3, 40, 30)
    expected, peaks = run(simt, m, e, *SUM, (24, 19), 1.0)
    m[0, 39, 3] = e[2, 0, 0] = value
    maps, scores = run(simt, m, e, *SUM, (24, 19), 1.0)
    assert maps[[0, 2]].isnan().all()
    assert scores.isnan().tolist() == [True, False, True]
    assert torch.equal(maps[1], expected[1])
    assert torch.equal(scores[1], peaks[1])


def resize(simt: Simt, maps: Tensor, sizes: list[tuple[int, int]]) -> Tensor:
    heights, widths = (torch.tensor([size[i] for size in sizes], dtype=torch.int64) for i in (0, 1))
    flat = torch.full((int((heights * widths).sum()),), -1.0)
    simt("resize_maps", maps, *maps.shape, heights, widths, flat)
    return flat


def check(simt: Simt, maps: Tensor, sizes: list[tuple[int, int]]) -> None:
    heights, widths = [h for h, _ in sizes], [w for _, w in sizes]
    assert_accurate(
        resize(simt, maps, sizes),
        reference.resize_maps(maps, heights, widths),
        reference.resize_maps(maps.double(), heights, widths),
    )


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (7, 31), (16, 17)])
def test_resize_against_reference(simt: Simt, size: tuple[int, int]) -> None:
    sizes = [size, (1, 1), (35, 301), (size[0], 2 * size[1] + 1), (5, size[1] // 3 + 1), (2, 520)]
    check(simt, torch.rand(len(sizes), *size), sizes)


def test_more_maps_than_one_launch_carries(simt: Simt) -> None:
    check(simt, torch.rand(131, 3, 4), [(1 + i % 5, 1 + i % 7) for i in range(131)])


def test_nothing_to_do(simt: Simt) -> None:
    run(simt, torch.empty(0, 3, 4), None, *ALONE, (8, 8), 1.0)
    assert resize(simt, torch.empty(0, 3, 4), []).shape == (0,)
