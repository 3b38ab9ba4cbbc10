"""The packed layout: the same in C++ and Python, small, and undone by unpack."""

import pytest
import torch

from npad import ops
from npad.ops import reference
from npad.ops._extension import core


@pytest.mark.parametrize("channels", [1, 7, 8, 9, 31, 100, 129, 256])
def test_size_is_the_same_in_both_languages(channels: int) -> None:
    row, column = reference.packed_layout(channels)
    assert len(row) == len(column) == ops.packed_size(channels) == core.packed_size(channels)


@pytest.mark.parametrize(("channels", "most"), [(100, 1.12), (256, 1.05), (384, 1.05), (550, 1.05)])
def test_layout_wastes_little(channels: int, most: float) -> None:
    assert ops.packed_size(channels) <= most * channels * (channels + 1) / 2


@pytest.mark.parametrize("channels", [1, 7, 8, 9, 31, 100])
def test_every_element_has_one_slot(channels: int) -> None:
    row, column = reference.packed_layout(channels)
    stored = [(int(i), int(j)) for i, j in zip(row, column, strict=True) if 0 <= j <= i]
    assert sorted(stored) == [(i, j) for i in range(channels) for j in range(i + 1)]


@pytest.mark.parametrize("dtype", ops.FACTOR_DTYPES)
@pytest.mark.parametrize("channels", [1, 7, 8, 31, 129])
def test_pack_factor(isa: str, channels: int, dtype: torch.dtype) -> None:
    dense = torch.randn(3, channels, channels)  # what lies above the diagonal is ignored
    packed = ops.pack_factor(dense, dtype)
    assert torch.equal(packed, reference.pack_factor(dense, dtype))
    assert torch.equal(reference.unpack(packed, channels), dense.tril().to(dtype))
    assert torch.equal(ops.pack_factor(dense.mT.contiguous().mT, dtype), packed)


def test_pack_factor_rejects() -> None:
    with pytest.raises(TypeError, match="factor must be float32, got float64"):
        ops.pack_factor(torch.eye(3).double()[None])
    with pytest.raises(TypeError, match="dtype must be float32, float16 or bfloat16"):
        ops.pack_factor(torch.eye(3)[None], torch.float64)
    with pytest.raises(ValueError, match=r"shape \(R, C, C\), got \(3, 4\)"):
        ops.pack_factor(torch.zeros(3, 4))
