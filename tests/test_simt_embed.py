"""The CUDA kernel of embed, on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from accuracy import assert_accurate
from op_cases import room_of
from simt_device import LaunchError, Simt, load
from torch import Tensor

from npad.ops import reference

TYPES = (torch.float32, torch.float16, torch.bfloat16)  # in the order of DataType


@pytest.fixture(params=["simt_fast", "simt_fma", "simt_checked"])
def simt(request: pytest.FixtureRequest) -> Simt:
    return load(request.param)


@pytest.fixture
def fast() -> Simt:
    return load("simt_fast")


def run(simt: Simt, levels: Sequence[Tensor], grid: tuple[int, int], offset: int = 0) -> Tensor:
    """`offset` floats into the memory of the embeddings."""
    batch, channels = len(levels[0]), sum(x.shape[1] for x in levels)
    size = batch * grid[0] * grid[1] * channels
    embedding = torch.full((offset + size,), torch.nan)[offset:]
    table = torch.tensor([(x.data_ptr(), *x.shape[1:], *x.stride()) for x in levels])
    simt(
        "embed", table, len(levels), TYPES.index(levels[0].dtype), batch, *grid, embedding,
        reached=[room_of(x) for x in levels if x.numel()],
    )  # fmt: skip
    return embedding.view(batch, *grid, channels)


def check(simt: Simt, levels: Sequence[Tensor], grid: tuple[int, int], offset: int = 0) -> None:
    oracle = reference.embed([x.double() for x in levels], grid)
    assert_accurate(run(simt, levels, grid, offset), reference.embed(levels, grid), oracle)


def channels_last(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype).to(memory_format=torch.channels_last)


def slice_of(level: Tensor, first: int) -> Tensor:
    """Channels from `first` on, of a level that keeps its strides."""
    return level[:, first:]


@pytest.mark.parametrize("dtype", TYPES)
def test_against_reference(simt: Simt, dtype: torch.dtype) -> None:
    """Channels side by side, apart and neither, of whole quads and not."""
    levels = [
        channels_last(2, 36, 6, 7, dtype=dtype),
        torch.randn(2, 5, 3, 4).to(dtype),
        channels_last(2, 7, 3, 4, dtype=dtype),
        torch.randn(2, 9, 9, 15).to(dtype)[:, ::2, 1:, ::3],
    ]
    check(simt, levels, (6, 7))


@pytest.mark.parametrize("channels", [1, 4, 31, 32, 33, 68])
@pytest.mark.parametrize("last", [True, False], ids=["channels-last", "channels-first"])
def test_channels(fast: Simt, last: bool, channels: int) -> None:
    levels = [torch.randn(2, channels, *size) for size in [(5, 6), (3, 3)]]
    if last:
        levels = [x.to(memory_format=torch.channels_last) for x in levels]
    check(fast, levels, (5, 6))


@pytest.mark.parametrize("grid", [(1, 1), (5, 3), (4, 33), (9, 65)])
def test_sizes(fast: Simt, grid: tuple[int, int]) -> None:
    """Levels of one pixel, of the grid's size, smaller and much larger than it."""
    sizes = [(1, 1), (1, 7), (40, 2), (3, 31), (3, 70), grid]
    check(fast, [channels_last(1, 8, *size) for size in sizes], grid)
    check(fast, [torch.randn(1, 3, *size) for size in sizes], grid)


def test_sizes_are_checked() -> None:
    checked = load("simt_checked")
    check(checked, [channels_last(1, 8, 3, 40), channels_last(1, 4, 2, 20)], (3, 40))
    check(checked, [torch.randn(1, 5, 7, 150), torch.randn(1, 2, 1, 1)], (2, 35))


@pytest.mark.parametrize("first", [0, 1, 2, 4])
@pytest.mark.parametrize("offset", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_any_alignment(fast: Simt, dtype: torch.dtype, offset: int, first: int) -> None:
    level = slice_of(channels_last(2, 12, 3, 5, dtype=dtype), first)
    check(fast, [level, level[:, :4]], (3, 5), offset)


def test_alignment_is_checked() -> None:
    checked = load("simt_checked")
    check(checked, [slice_of(channels_last(1, 12, 2, 3), 2)], (2, 3), 1)
    check(checked, [slice_of(channels_last(1, 12, 2, 3), 4)], (4, 5))


def test_more_levels_than_a_launch_takes(simt: Simt) -> None:
    check(simt, [channels_last(2, 1 + i % 4, 2 + i % 3, 3) for i in range(19)], (3, 3))


def test_nan_and_infinity(fast: Simt) -> None:
    for size in [(5, 6), (4, 5), (10, 12)]:
        for value in (torch.nan, torch.inf, -torch.inf):
            level = channels_last(1, 8, *size)
            level[0, 3, 0, 1] = level[0, 5, -1, -1] = value
            actual, expected = run(fast, [level], (5, 6)), reference.embed([level], (5, 6))
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_an_image_gives_the_same_bits_alone_and_in_a_batch(fast: Simt) -> None:
    levels = [channels_last(3, 8, 5, 6), torch.randn(3, 5, 3, 3)]
    together = run(fast, levels, (5, 6))
    for n in range(3):
        assert torch.equal(run(fast, [x[n : n + 1] for x in levels], (5, 6))[0], together[n])


def test_nothing_to_do(simt: Simt) -> None:
    assert run(simt, [torch.empty(0, 3, 4, 4)], (4, 4)).numel() == 0


def test_limits(fast: Simt) -> None:
    level = torch.zeros(1, 1, 1, 1).expand(1, 1, 2**15, 2**15)
    table = torch.tensor([(level.data_ptr(), *level.shape[1:], *level.stride())])
    with pytest.raises(LaunchError, match="cudaError 9"):
        fast("embed", table, 1, 0, 1, 2**16, 1, torch.empty(0))
