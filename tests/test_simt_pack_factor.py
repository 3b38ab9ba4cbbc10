"""pack_factor's CUDA kernel, run on the CPU."""

from __future__ import annotations

import pytest
import torch
from simt_device import Simt, load

from npad import ops
from npad.ops import reference

TYPES = (torch.float32, torch.float16, torch.bfloat16)  # in the order of DataType


@pytest.fixture(params=["simt_fast", "simt_checked"])
def simt(request: pytest.FixtureRequest) -> Simt:
    return load(request.param)


def pack(simt: Simt, dense: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    count, channels, _ = dense.shape
    packed = torch.full((count, ops.packed_size(channels)), torch.nan, dtype=dtype)
    simt("pack_factor", dense, count, channels, packed, TYPES.index(dtype))
    return packed


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("channels", [1, 7, 8, 17, 31, 33, 100, 129])
def test_against_reference(simt: Simt, channels: int, dtype: torch.dtype) -> None:
    dense = torch.randn(3, channels, channels)  # what stands above the diagonal is not read
    assert torch.equal(pack(simt, dense, dtype), reference.pack_factor(dense, dtype))


@pytest.mark.parametrize("dtype", TYPES)
def test_rounds_to_nearest_even(simt: Simt, dtype: torch.dtype) -> None:
    """Ties, subnormals, overflow, infinity and NaN."""
    tie = torch.arange(1, 9) * 2.0**-12
    values = torch.cat(
        [1 + tie, 1 + 16 * tie, tie * 2.0**-14, torch.tensor([65519.0, 65520.0, 3.4e38, 1e-42])]
    )
    values = torch.cat([values, -values, torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0])])
    dense = values[:, None, None]
    expected = reference.pack_factor(dense, dtype)
    torch.testing.assert_close(pack(simt, dense, dtype), expected, rtol=0, atol=0, equal_nan=True)


def test_nothing_to_pack(simt: Simt) -> None:
    pack(simt, torch.empty(0, 5, 5), torch.float16)
