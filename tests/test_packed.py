"""The packed layout: the same in C++ and Python, small, and undone by unpack."""

import pytest
import torch

from npad import ops
from npad.ops import reference
from npad.ops._extension import core
from npad.ops.packed import is_finite, packed_layout, restore


@pytest.mark.parametrize("channels", [1, 7, 8, 9, 31, 100, 129, 256])
def test_size_is_the_same_in_both_languages(channels: int) -> None:
    row, column = packed_layout(channels)
    assert len(row) == len(column) == ops.packed_size(channels) == core.packed_size(channels)


@pytest.mark.parametrize(("channels", "most"), [(100, 1.12), (256, 1.05), (384, 1.05), (550, 1.05)])
def test_layout_wastes_little(channels: int, most: float) -> None:
    assert ops.packed_size(channels) <= most * channels * (channels + 1) / 2


@pytest.mark.parametrize("channels", [1, 7, 8, 9, 31, 100])
def test_every_element_has_one_slot(channels: int) -> None:
    row, column = packed_layout(channels)
    stored = [(int(i), int(j)) for i, j in zip(row, column, strict=True) if 0 <= j <= i]
    assert sorted(stored) == [(i, j) for i in range(channels) for j in range(i + 1)]


@pytest.mark.parametrize("dtype", ops.FACTOR_DTYPES)
@pytest.mark.parametrize("channels", [1, 7, 8, 31, 129])
def test_pack_factor(isa: str, channels: int, dtype: torch.dtype) -> None:
    dense = torch.randn(3, channels, channels)  # what lies above the diagonal is ignored
    packed = ops.pack_factor(dense, dtype)
    assert torch.equal(packed, reference.pack_factor(dense, dtype))
    assert packed.dtype == dtype
    assert packed.shape == (3, ops.stored_size(channels, dtype))
    found = reference.unpack(restore(packed, channels, torch.float32), channels)
    if dtype == torch.int8:  # to half a step of the block's largest number, which is exact
        step = dense.tril().abs().amax((1, 2), keepdim=True) / 127
        assert ((found - dense.tril()).abs() <= 0.5001 * step).all()
    else:
        assert torch.equal(found, dense.tril().to(dtype).float())
    assert torch.equal(ops.pack_factor(dense.mT.contiguous().mT, dtype), packed)


@pytest.mark.parametrize("channels", [1, 7, 8, 9, 31, 32, 33, 100, 129, 256])
def test_bytes_take_as_many_in_both_languages(channels: int) -> None:
    size = ops.stored_size(channels, torch.int8)
    assert size == core.byte_size(channels)
    assert size % 16 == 0
    least = ops.packed_size(channels)
    assert size <= least + 4 * (least / 256 + channels / 8 + 1) + 15


def test_each_block_has_a_scale_of_its_own() -> None:
    """Of 70 channels: two rows of padding; blocks end at columns 30 and 62 of a panel."""
    dense = torch.randn(2, 70, 70).tril()
    dense[0, 62:, 30:62] *= 1e-6
    dense[0, 62:, 62:] *= 1e6
    found = reference.unpack(restore(ops.pack_factor(dense, torch.int8), 70, torch.float32), 70)
    for rows in (slice(0, 6), slice(6, 14), slice(62, 70)):
        for columns in (slice(0, 30), slice(30, 62), slice(62, 70)):
            block = dense[:, rows, columns]
            if block.any():
                step = block.abs().amax((1, 2), keepdim=True) / 127
                assert ((found[:, rows, columns] - block).abs() <= 0.5001 * step).all()
                largest = block.abs() == block.abs().amax((1, 2), keepdim=True)
                torch.testing.assert_close(found[:, rows, columns][largest], block[largest])


@pytest.mark.parametrize("hostile", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_so_in_its_block(hostile: float) -> None:
    dense = torch.eye(40).repeat(2, 1, 1)
    dense[0, 39, 35] = hostile
    packed = ops.pack_factor(dense, torch.int8)
    found = reference.unpack(restore(packed, 40, torch.float32), 40)
    assert not found[0, 32:40, 32:40].tril().isfinite()[7].any()
    torch.testing.assert_close(found[0, :32], dense[0, :32])
    torch.testing.assert_close(found[1], dense[1])
    assert (is_finite(packed, 40), is_finite(packed[1:], 40)) == (False, True)


def test_zeros_and_the_smallest_numbers() -> None:
    """A block of zeros has no scale to divide by; float16 would hold neither of the others."""
    dense = torch.zeros(3, 9, 9)
    dense[1, 8, 8], dense[2, 8, 8] = 1e-35, 1e38
    found = reference.unpack(restore(ops.pack_factor(dense, torch.int8), 9, torch.float32), 9)
    torch.testing.assert_close(found, dense, rtol=1e-5, atol=0)


def test_pack_factor_rejects() -> None:
    with pytest.raises(TypeError, match="factor must be float32, got float64"):
        ops.pack_factor(torch.eye(3).double()[None])
    with pytest.raises(TypeError, match="dtype must be float32, float16, bfloat16 or int8"):
        ops.pack_factor(torch.eye(3)[None], torch.float64)
    with pytest.raises(ValueError, match=r"shape \(R, C, C\), got \(3, 4\)"):
        ops.pack_factor(torch.zeros(3, 4))
