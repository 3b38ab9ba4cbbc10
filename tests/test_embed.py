"""embed: patch average, bilinear sampling and concatenation of feature levels in one pass."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from accuracy import assert_accurate
from torch import Tensor

from npad import ops
from npad.ops import reference

Layout = Callable[[Tensor], Tensor]


def channels_last(x: Tensor) -> Tensor:
    return x.to(memory_format=torch.channels_last)


def channels_first(x: Tensor) -> Tensor:
    return x.contiguous()


def within(x: Tensor, order: tuple[int, ...], step: int) -> Tensor:
    """The same values as every step-th of each dimension, from 1, of a tensor laid out in `order`."""
    room = torch.full([step * x.shape[d] + 3 for d in order], torch.nan, dtype=x.dtype)
    view = room.permute([order.index(d) for d in range(4)])
    view = view[tuple(slice(1, 1 + step * n, step) for n in x.shape)]
    view.copy_(x)
    return view


def part_of_channels_last(x: Tensor) -> Tensor:
    return within(x, (0, 2, 3, 1), 1)


def part_of_channels_first(x: Tensor) -> Tensor:
    return within(x, (0, 1, 2, 3), 1)


def every_other(x: Tensor) -> Tensor:
    return within(x, (0, 1, 2, 3), 2)


def batch_last(x: Tensor) -> Tensor:
    return within(x, (3, 1, 2, 0), 1)


LAYOUTS = [
    channels_last,
    channels_first,
    part_of_channels_last,
    part_of_channels_first,
    every_other,
    batch_last,
]


def check(levels: list[Tensor], grid: tuple[int, int]) -> None:
    oracle = reference.embed([level.double() for level in levels], grid)
    actual = ops.embed(levels, grid)
    assert actual.is_contiguous()
    assert_accurate(actual, reference.embed(levels, grid), oracle)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("channels", [1, 7, 16, 33])
def test_against_reference(isa: str, channels: int, threads: int, layout: Layout) -> None:
    torch.set_num_threads(threads)
    sizes = [(7, 18), (4, 9), (3, 5), (9, 37), (1, 1), (16, 16)]
    levels = [layout(torch.randn(2, channels + i % 2, *size)) for i, size in enumerate(sizes)]
    check(levels, (7, 18))


@pytest.mark.parametrize("layout", LAYOUTS[:4], ids=lambda f: f.__name__)
@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (8, 16), (5, 33)])
def test_sizes(isa: str, grid: tuple[int, int], layout: Layout) -> None:
    sizes = [(1, 1), (1, 9), (9, 1), (2, 2), (3, 31), (33, 5), (8, 16)]
    check([layout(torch.randn(2, 19, *size)) for size in sizes], grid)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(isa: str, dtype: torch.dtype, layout: Layout) -> None:
    """Half floats are widened before anything is added."""
    levels = [layout((100 * torch.randn(3, 33, *size)).to(dtype)) for size in [(6, 21), (3, 10)]]
    assert ops.embed(levels, (6, 21)).dtype == torch.float32
    check(levels, (6, 21))


def test_every_half_float(isa: str) -> None:
    """Subnormal, infinite and NaN ones too: a patch on its own is the value over 9."""
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        level = bits.view(dtype).reshape(1, -1, 1, 1)
        expected = reference.embed([level], (1, 1))
        actual = ops.embed([level], (1, 1))
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0, equal_nan=True)


def looped(levels: list[np.ndarray], grid: tuple[int, int]) -> np.ndarray:
    """From the definition, one number at a time."""
    out = np.zeros((len(levels[0]), *grid, sum(x.shape[1] for x in levels)))
    for n, y, x in np.ndindex(*out.shape[:3]):
        values = []
        for level in levels:
            height, width = level.shape[2:]
            v = min(max((y + 0.5) * height / grid[0] - 0.5, 0), height - 1)
            u = min(max((x + 0.5) * width / grid[1] - 0.5, 0), width - 1)
            for channel in level[n]:
                total = 0.0
                for r, c in np.ndindex(height, width):
                    share = max(0, 1 - abs(v - r)) * max(0, 1 - abs(u - c))
                    patch = channel[max(r - 1, 0) : r + 2, max(c - 1, 0) : c + 2]
                    total += share * patch.sum() / 9
                values.append(total)
        out[n, y, x] = values
    return out


@pytest.mark.parametrize("layout", [channels_last, channels_first], ids=lambda f: f.__name__)
def test_is_its_definition(isa: str, layout: Layout) -> None:
    levels = [torch.randn(2, 3, *size) for size in [(4, 5), (2, 3), (6, 7), (1, 1)]]
    expected = torch.from_numpy(looped([x.double().numpy() for x in levels], (4, 5)))
    torch.testing.assert_close(
        ops.embed([layout(x) for x in levels], (4, 5)).double(), expected, rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(reference.embed([x.double() for x in levels], (4, 5)), expected)


def test_by_hand(isa: str) -> None:
    level = torch.tensor([[9.0, 18.0]]).reshape(1, 1, 1, 2)
    assert ops.embed([level], (1, 2)).flatten().tolist() == [3.0, 3.0]  # zeros counted
    edge = torch.zeros(1, 1, 1, 5)
    edge[..., 0] = 9.0
    patches = ops.embed([edge], (1, 5)).flatten()
    assert patches.tolist() == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert ops.embed([edge], (1, 10)).flatten().tolist() == [1, 1, 1, 0.75, 0.25, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_an_image_gives_the_same_bits_alone_and_in_a_batch(isa: str, layout: Layout) -> None:
    levels = [torch.randn(5, 21, *size) for size in [(6, 19), (3, 9)]]
    torch.set_num_threads(2)
    together = ops.embed([layout(x) for x in levels], (6, 19))
    torch.set_num_threads(1)
    for n in range(5):
        assert torch.equal(
            ops.embed([layout(x[n : n + 1]) for x in levels], (6, 19))[0], together[n]
        )
    # Nor does it matter how the levels lie in memory.
    assert torch.equal(ops.embed([channels_last(x) for x in levels], (6, 19)), together)


@pytest.mark.parametrize("channels", [(32, 32), (33, 32)])
def test_large_embeddings(isa: str, channels: tuple[int, int]) -> None:
    """From 8 MiB on, where they are aligned, they are written past the caches."""
    levels = [torch.randn(2, c, s, s) for c, s in zip(channels, (128, 64), strict=True)]
    levels = [channels_last(x) for x in levels]
    torch.set_num_threads(2)
    together = ops.embed(levels, (128, 128))
    assert together.nbytes >= 8 << 20
    for n in range(2):
        assert torch.equal(ops.embed([x[n : n + 1] for x in levels], (128, 128))[0], together[n])


def faults(work: Callable[[], object]) -> int:
    resource = pytest.importorskip("resource")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    work()
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)


def touch(memory: mmap.mmap) -> None:
    for i in range(0, len(memory), 4096):
        memory[i] = 1


def test_new_memory_comes_in_huge_pages() -> None:
    """Where the system has them to give, but only to those who ask."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[madvise]" not in setting.read_text():
        pytest.skip("the system gives huge pages to all, or to none")
    n_bytes = 64 << 20
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    with mmap.mmap(-1, n_bytes, flags) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        if faults(lambda: touch(memory)) > n_bytes // 4096 / 4:
            pytest.skip("the system has no huge pages left")
    level = torch.randn(1, 16, 64, 64)
    assert faults(lambda: torch.zeros(n_bytes // 4)) >= n_bytes // 4096
    assert faults(lambda: ops.embed([level], (1024, 1024))) < n_bytes // 4096 / 2


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("size", [(5, 21), (5, 10), (10, 42), (4, 8)])
@pytest.mark.parametrize("layout", [channels_last, channels_first], ids=lambda f: f.__name__)
def test_nan_and_infinity_go_where_the_reference_sends_them(
    isa: str, layout: Layout, size: tuple[int, int], value: float
) -> None:
    """At sizes where no cell samples the very centre of a pixel inside, which rounding may miss."""
    for row, column in [(0, 0), (2, 3), (size[0] - 1, size[1] - 1), (1, size[1] - 2)]:
        level = torch.randn(1, 18, *size)
        level[0, 4, row, column] = value
        actual, expected = (f([layout(level)], (5, 21)) for f in (ops.embed, reference.embed))
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
        assert not actual.isfinite().all()


def test_what_surrounds_a_view_is_neither_read_nor_written(isa: str) -> None:
    """`within` puts NaN around every level; here it would reach the embedding with any weight."""
    for layout in LAYOUTS:
        levels = [layout(torch.randn(2, 17, *size)) for size in [(3, 5), (2, 18)]]
        assert ops.embed(levels, (3, 5)).isfinite().all()


def test_empty_batch(isa: str) -> None:
    assert ops.embed([torch.randn(0, 3, 4, 4), torch.randn(0, 5, 2, 2)], (4, 4)).shape == (
        0,
        4,
        4,
        8,
    )


def test_opcheck() -> None:
    levels = [channels_last(torch.randn(2, 3, 4, 5)), torch.randn(2, 2, 2, 3)]
    torch.library.opcheck(torch.ops.npad.embed.default, (levels, [4, 5]))


def test_rejects() -> None:
    x = torch.randn(2, 3, 4, 5)
    with pytest.raises(ValueError, match=r"npad.embed: levels must hold at least one level"):
        ops.embed([], (4, 5))
    with pytest.raises(ValueError, match=r"grid must be at least \(1, 1\), got \(0, 5\)"):
        ops.embed([x], (0, 5))
    with pytest.raises(TypeError, match=r"levels\[0\] must be float32 or .*, got float64"):
        ops.embed([x.double()], (4, 5))
    with pytest.raises(TypeError, match=r"levels\[1\] must be float32, got float16"):
        ops.embed([x, x.half()], (4, 5))
    with pytest.raises(
        ValueError, match=r"levels\[1\] must have shape \(N, C, H, W\) with C, H, W"
    ):
        ops.embed([x, x[0]], (4, 5))
    with pytest.raises(ValueError, match=r"C, H, W >= 1, got \(2, 3, 0, 5\)"):
        ops.embed([x[:, :, :0]], (4, 5))
    with pytest.raises(
        ValueError, match=r"levels\[1\] must have shape \(N, C, H, W\) = \(2, 3, 4, 5\), got \(1,"
    ):
        ops.embed([x, x[:1]], (4, 5))
    with pytest.raises(ValueError, match=r"levels\[1\] is on meta but levels\[0\] is on cpu"):
        ops.embed([x, x.to("meta")], (4, 5))
