"""The CPU emulator of CUDA and device_utils.cuh, on the kernels of tests/simt/self_test.cu."""

from __future__ import annotations

import pytest
import torch
from simt_device import SM86, SM90, LaunchError, Simt, load


@pytest.fixture(params=["simt_fast", "simt_checked"])
def simt(request: pytest.FixtureRequest) -> Simt:
    return load(request.param)


@pytest.fixture
def checked() -> Simt:
    return load("simt_checked")


def nan(*shape: int) -> torch.Tensor:
    return torch.full(shape, torch.nan)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (7, 33), (64, 31), (45, 100)])
def test_shared_tile(simt: Simt, height: int, width: int) -> None:
    x, y = torch.randn(height, width), nan(width, height)
    simt("transpose", x, height, width, y)
    torch.testing.assert_close(y, x.T, rtol=0, atol=0)


@pytest.mark.parametrize("columns", [1, 31, 96, 1000])
def test_block_reduce(simt: Simt, columns: int) -> None:
    x, result = torch.randn(3, columns), nan(3, 4)
    x[2, columns // 2] = torch.nan
    simt("reduce_rows", x, 3, columns, result)
    expected = torch.stack([x.sum(1), (x * x).sum(1), x.amin(1), x.amax(1)], 1)
    torch.testing.assert_close(result, expected, equal_nan=True)


def test_warp_functions(simt: Simt) -> None:
    x = torch.randint(-9, 10, (32,), dtype=torch.int32)
    result = torch.zeros(15, 32, dtype=torch.int32)
    simt("warp_functions", x, result)
    lane = torch.arange(32)
    positive = x > 0
    bits = int((positive.long() << lane).sum())
    everywhere = torch.ones(32, dtype=torch.int32)
    xor = 0
    for v in x.tolist():
        xor ^= v
    expected = [
        x[5] * everywhere,
        x[lane // 8 * 8 + 3],
        x[lane ^ 9],
        x[torch.where(lane >= 2, lane - 2, lane)],
        x[torch.where(lane % 16 < 13, lane + 3, lane)],
        torch.tensor(bits).to(torch.int32) * everywhere,
        0 * everywhere,
        everywhere,
        x.view(2, 16).sum(1).repeat_interleave(16),
        positive.sum() * everywhere,
        0 * everywhere,
        everywhere,
        x.sum() * everywhere,
        x.min() * everywhere,
        xor * everywhere,
    ]
    for row, (actual, wanted) in enumerate(zip(result, expected, strict=True)):
        assert actual.tolist() == wanted.tolist(), row


def check_mma(simt: Simt, type_: torch.dtype, shuffles: bool) -> None:
    depth = 48
    a, b = torch.randn(16, depth).to(type_), torch.randn(8, depth).to(type_)
    c = torch.randn(16, 8)
    exact = [t.double() for t in (a, b)]
    if type_ is torch.float32:  # what TF32 keeps of it
        exact = [(t.view(torch.int32) & ~0x1FFF).view(torch.float32).double() for t in (a, b)]
    expected = c.double() + exact[0] @ exact[1].T
    which = [torch.float32, torch.float16, torch.bfloat16].index(type_)
    simt("product", which, int(shuffles), a, b, depth * type_.itemsize // 4, c)
    torch.testing.assert_close(c.double(), expected, rtol=0, atol=3e-5)


@pytest.mark.parametrize("shuffles", [False, True], ids=["instruction", "shuffles"])
@pytest.mark.parametrize("type_", [torch.float32, torch.float16, torch.bfloat16])
def test_mma(simt: Simt, type_: torch.dtype, shuffles: bool) -> None:
    check_mma(simt, type_, shuffles)


@pytest.mark.parametrize("type_", [torch.float32, torch.float16, torch.bfloat16])
def test_mma_of_sm_75(type_: torch.dtype) -> None:
    check_mma(load("simt_sm75"), type_, shuffles=False)


@pytest.mark.parametrize("type_", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("factor", "total"),
    [
        (2.0**-13, 0.0),  # sixteen or eight times 2^-26: each is cut
        (2.0**-12, 1.0),  # each stays, and so does their sum
    ],
)
def test_mma_truncates(simt: Simt, type_: torch.dtype, factor: float, total: float) -> None:
    depth = 32 // type_.itemsize
    a, b = torch.full((16, depth), factor).to(type_), torch.full((8, depth), factor).to(type_)
    a[8:] *= -1
    c = torch.ones(16, 8)
    c[8:] = -1
    which = [torch.float32, torch.float16, torch.bfloat16].index(type_)
    expected = c * (1 + total * depth * factor**2)
    simt("product", which, 0, a, b, 8, c)
    assert torch.equal(c, expected)


@pytest.mark.parametrize("stages", [1, 2, 7])
def test_asynchronous_copies(simt: Simt, stages: int) -> None:
    x, total = torch.randn(stages, 64), nan(64)
    simt("copy", 0, x, stages, total)
    torch.testing.assert_close(total, x.sum(0).roll(-1))


@pytest.mark.parametrize("fault", [1, 3], ids=["no wait", "for one group too few"])
def test_missing_wait_gives_wrong_data(fault: int) -> None:
    total = nan(64)
    load("simt_fast")("copy", fault, torch.randn(3, 64), 3, total)
    assert total.isnan().all()


@pytest.mark.parametrize(
    ("fault", "report"),
    [
        (1, r"copies asynchronously since .* and has not waited"),
        (2, r"race: copies to .* reads it|reads .* copies asynchronously"),
        (3, r"copies asynchronously since .* and has not waited"),
    ],
)
def test_asynchronous_copies_are_checked(checked: Simt, fault: int, report: str) -> None:
    with pytest.raises(LaunchError, match=report):
        checked("copy", fault, torch.randn(3, 64), 3, nan(64))


@pytest.mark.parametrize("n", [1, 50, 1000])
@pytest.mark.parametrize("processors", [1, 4])
def test_grid_barrier_and_keys(simt: Simt, n: int, processors: int) -> None:
    x = torch.randint(-20, 21, (n,)).float()
    keys, scaled = torch.zeros(2, dtype=torch.int64), nan(n)
    if n == 1000:
        x[77] = torch.inf
    simt("extremes", x, n, keys, scaled, processors=processors)
    torch.testing.assert_close(scaled, x / x.max(), equal_nan=True)
    nearest, farthest = (int(k) & 0xFFFFFFFF for k in keys)
    assert nearest == int((x == x.min()).nonzero()[0])
    assert ~farthest & 0xFFFFFFFF == int((x == x.max()).nonzero()[0])


def test_nan_is_the_farthest(simt: Simt) -> None:
    x = torch.tensor([1.0, torch.inf, torch.nan, -2.0])
    keys = torch.zeros(2, dtype=torch.int64)
    simt("extremes", x, 4, keys, nan(4))
    assert int(keys[0]) & 0xFFFFFFFF == 3
    assert ~int(keys[1]) & 0xFFFFFFFF == 2


def test_split_tf32(simt: Simt) -> None:
    x = torch.cat([torch.randn(1000) * 10.0 ** torch.randint(-30, 30, (1000,)), torch.zeros(1)])
    hi, lo = nan(1001), nan(1001)
    simt("split", x, 1001, hi, lo)
    assert not (hi.view(torch.int32) & 0x1FFF).any()
    lo = (lo.view(torch.int32) & ~0x1FFF).view(torch.float32)
    assert ((hi.double() + lo.double() - x).abs() <= 2.0**-23 * x.abs()).all()


@pytest.mark.parametrize("library", ["simt_fast", "simt_fma", "simt_checked"])
def test_products_and_sums_are_fused_in_one_library(library: str) -> None:
    """Of x^2 - 1, rounding x^2 loses the last bits."""
    x = 1 + torch.arange(1, 65) * 2.0**-20
    plain, rounded = nan(64), nan(64)
    load(library)("fuse", x, 64, plain, rounded)
    exact = x.double() ** 2 - 1
    apart = (x * x - 1).float()
    assert torch.equal(rounded, apart)
    assert torch.equal(plain, exact.float() if library == "simt_fma" else apart)
    assert not torch.equal(exact.float(), apart)


def test_split_tf32_keeps_nan(simt: Simt) -> None:
    x = torch.tensor([0x7FFFFFFF, -1, 0x7F800000]).to(torch.int32).view(torch.float32)
    hi, lo = nan(3), nan(3)
    simt("split", x, 3, hi, lo)
    assert (hi + lo).isnan().all()


@pytest.mark.parametrize("type_", [torch.float16, torch.bfloat16])
def test_unpack_every_16_bit_float(simt: Simt, type_: torch.dtype) -> None:
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(type_)
    values = nan(2**16)
    simt("unpack_words", int(type_ is torch.bfloat16), x, 2**15, values)
    torch.testing.assert_close(values, x.float(), rtol=0, atol=0, equal_nan=True)


def test_the_order_of_threads_shows(simt: Simt) -> None:
    counter, ticket = torch.zeros(1, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    with pytest.raises(AssertionError, match="tensor 1 depends on the order"):
        simt("tickets", counter, ticket)


def test_ordered_by_warp_barriers(simt: Simt) -> None:
    x = torch.randn(128)
    expected = x.view(64, 2).flip(1).flatten() + 1
    simt("fault", 0, x, 128, 64)
    torch.testing.assert_close(x, expected)


NOT_REACHED = {
    12: r"__syncthreads at self_test.cu:\d+ waits for thread .*, which has returned",
    13: r"__syncthreads at self_test.cu:\d+ while thread .* waits in __syncthreads at self_test.cu",
    14: r"names lane 7, which has returned|waits for thread \(7, 0, 0\).*, which has returned",
    15: r"__shfl_sync at self_test.cu:\d+ waits for .* which waits in __syncthreads",
    16: "does not name the calling lane",
    17: "reads lane 20, which the mask does not name",
    18: "grid barrier in a launch that is not cooperative",
    21: r"__shfl_sync at self_test.cu:(\d+) while thread .* waits in __shfl_sync at (?!.*:\1$)",
    22: r"__any_sync at self_test.cu:\d+ while thread .* waits in __any_sync at self_test.cu:\d+",
}
MEMORY = {
    1: r"out of bounds: reads 4 bytes at byte 512 of argument 1, which has 512, at self_test.cu",
    2: r"out of bounds: writes 4 bytes at byte -4 of argument 1",
    3: r"out of bounds: reads 4 bytes at byte 256 of dynamic shared memory, which has 256",
    4: r"out of bounds: index 64 of an array, at self_test.cu:\d+",
    5: r"misaligned: access to 0x.*device_utils.cuh:\d+",
    6: r"race: (reads|writes) byte \d+ of dynamic shared memory at self_test.cu:\d+; thread",
    7: r"race: (reads|writes) byte \d+ of static shared memory",
    8: r"race: (reads|writes) byte \d+ of dynamic shared memory",
    9: r"reads byte 256 of dynamic shared memory at .*, which no thread of the block has written",
    10: r"race: writes byte \d+ of argument 1 at .* of block \(.* writes it at self_test.cu:\d+",
    11: r"race: (reads|writes) byte \d+ of argument 1",
    19: r"race: (atomically changes|writes) byte 0 of argument 1",
    20: r"out of bounds: reads \d+ bytes at byte \d+ of argument 1, which has 512, at .*self_test.cu",
}


@pytest.mark.parametrize("fault", NOT_REACHED)
def test_divergence_is_reported(simt: Simt, fault: int) -> None:
    with pytest.raises(LaunchError, match=NOT_REACHED[fault]):
        simt("fault", fault, torch.randn(128), 128, 64)


@pytest.mark.parametrize("fault", MEMORY)
def test_memory_faults_are_reported(checked: Simt, fault: int) -> None:
    floats = 128 if fault == 9 else 64
    with pytest.raises(LaunchError, match=MEMORY[fault]):
        checked("fault", fault, torch.randn(128), 128, floats)


def test_runs_after_a_fault(checked: Simt) -> None:
    for _ in range(2):
        with pytest.raises(LaunchError):
            checked("fault", 12, torch.randn(128), 128, 64)
        test_block_reduce(checked, 31)


def test_limits_of_a_launch(simt: Simt) -> None:
    for blocks, threads, shared_bytes in [(0, 32, 0), (1, 1025, 0)]:
        with pytest.raises(LaunchError, match="cudaError"):
            simt("idle", blocks, threads, shared_bytes)
    simt("meet", 6)
    with pytest.raises(LaunchError, match="cudaError 720"):
        simt("meet", 7)


@pytest.mark.parametrize("shared_bytes", [SM90, SM86])
def test_limit_of_shared_memory(shared_bytes: int) -> None:
    simt = load("simt_fast", shared_bytes)
    simt("idle", 3, 1024, shared_bytes)
    with pytest.raises(LaunchError, match="cudaError 1"):
        simt("idle", 1, 32, shared_bytes + 1)
