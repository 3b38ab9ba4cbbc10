"""resize_maps: each map of a batch at its image's own size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from accuracy import assert_accurate
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from npad import ops
from npad.ops import reference
from npad.scoring.fusion import resized


def check(maps: Tensor, sizes: list[tuple[int, int]]) -> None:
    heights, widths = [h for h, _ in sizes], [w for _, w in sizes]
    assert_accurate(
        ops.resize_maps(maps, sizes),
        reference.resize_maps(maps, heights, widths),
        reference.resize_maps(maps.double(), heights, widths),
    )


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (7, 31), (16, 16), (17, 33), (64, 48)])
def test_against_reference(isa: str, size: tuple[int, int]) -> None:
    """Up, down and neither, along each axis: the columns of one vector from one sample to far apart."""
    sizes = [
        size,
        (1, 1),
        (300, 301),
        (size[0], 2 * size[1] + 1),
        (5, 4 * size[1] // 7 + 1),
        (3 * size[0], size[1] // 3 + 1),
        (2, 1000),
    ]
    check(torch.rand(len(sizes), *size), sizes)


@given(
    size=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    sizes=st.lists(st.tuples(st.integers(1, 90), st.integers(1, 150)), max_size=4),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=80, deadline=None)
def test_any_sizes(size: tuple[int, int], sizes: list[tuple[int, int]], seed: int) -> None:
    torch.manual_seed(seed)
    check(torch.rand(len(sizes), *size), sizes)


def test_agrees_with_pillow(isa: str) -> None:
    """Upsampling only: Pillow averages where it shrinks."""
    map_ = torch.rand(1, 23, 31)
    image = Image.fromarray(map_[0].numpy()).resize((171, 90), Image.Resampling.BILINEAR)
    (own,) = resized(map_, [(90, 171)])
    np.testing.assert_allclose(own, np.asarray(image), rtol=0, atol=1e-6)


def test_the_same_size_is_the_same_map(isa: str) -> None:
    maps = torch.rand(2, 19, 37)
    for own, map_ in zip(resized(maps, [(19, 37)] * 2), maps, strict=True):
        np.testing.assert_array_equal(own, map_.numpy())


@pytest.mark.parametrize("value", [1 / 3, 12345.678, float("nan")])
def test_a_constant_map_stays_exactly_constant(isa: str, value: float) -> None:
    maps = torch.full((2, 7, 40), value)
    for own in resized(maps, [(61, 147), (5, 3)]):
        np.testing.assert_array_equal(own, np.float32(value))


def test_views_of_one_array() -> None:
    sizes = [(3, 4), (50, 20), (1, 1)]
    own = resized(torch.rand(3, 8, 8), sizes)
    assert [map_.shape for map_ in own] == sizes
    assert all(map_.dtype == np.float32 and map_.base is own[0].base for map_ in own)
    assert resized(torch.rand(0, 8, 8), []) == []


def test_strides_threads_batches_and_rerun(isa: str) -> None:
    maps = torch.rand(30, 33, 5).permute(2, 0, 1)
    sizes = [(200, 210), (10, 7), (33, 30), (90, 500), (150, 20)]
    torch.set_num_threads(1)
    flat = ops.resize_maps(maps.contiguous(), sizes)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for _ in range(2):
            assert torch.equal(ops.resize_maps(maps, sizes), flat)
        alone = [ops.resize_maps(maps[i : i + 1], sizes[i : i + 1]) for i in range(5)]
        assert torch.equal(torch.cat(alone), flat)


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.npad.resize_maps.default, (torch.rand(2, 4, 5), [3, 9], [8, 2]))


def test_rejects() -> None:
    maps = torch.rand(2, 4, 5)
    with pytest.raises(TypeError, match="resize_maps: maps must be float32, got float64"):
        ops.resize_maps(maps.double(), [(8, 8)] * 2)
    for bad in (maps[0], torch.rand(2, 4, 0)):
        with pytest.raises(ValueError, match=r"\(N, H, W\) with H, W >= 1, got "):
            ops.resize_maps(bad, [(8, 8)] * 2)
    with pytest.raises(ValueError, match="sizes must be 2, as many as maps, got 3"):
        ops.resize_maps(maps, [(8, 8)] * 3)
    with pytest.raises(ValueError, match=r"sizes\[1\] must be at least \(1, 1\), got \(8, 0\)"):
        ops.resize_maps(maps, [(8, 8), (8, 0)])
