"""Loads the extension, of which it is the only user, and holds what its kernels ask of every device."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor

from npad.ops.reference import axis_band

core: Any
try:
    from npad import _core

    core = _core
except ImportError as error:  # the package still works, only slower
    core = None
    warnings.warn(
        f"npad: the compiled kernels cannot be loaded ({error}); the slow PyTorch reference runs "
        "instead. Rebuild them with: pip install --force-reinstall --no-deps npad",
        RuntimeWarning,
        stacklevel=2,
    )
cuda: Any = getattr(core, "cuda", None)  # None where it was built without

VECTOR_BYTES = 16  # of one load or store in CUDA kernels; an address that is no multiple is a fault


def info() -> dict[str, Any]:
    """What the extension was built with and what it uses here."""
    if core is None:
        return {"kernels": "PyTorch reference"}
    return {
        "kernels": "native",
        "isa": core.isa(),
        "isas": core.isas(),
        "cuda": cuda.architectures if cuda is not None else None,
    }


def passed(arguments: tuple[Any, ...]) -> list[Any]:
    """The arguments as the extension takes them: of tensors their addresses, of dtypes its own."""
    return [_passed(a) for a in arguments]


def _passed(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    if isinstance(argument, torch.dtype):
        return getattr(core.DataType, str(argument).removeprefix("torch."))
    return argument


def dense(x: Tensor) -> Tensor:
    """The same embeddings, contiguous and in float32."""
    return x.to(torch.float32).contiguous()


def is_aligned(x: Tensor) -> bool:
    """Whether a kernel may load and store whole vectors from where the tensor starts."""
    return x.data_ptr() % VECTOR_BYTES == 0


def aligned(x: Tensor) -> Tensor:
    """The same values, contiguous and where a kernel may load whole vectors."""
    x = x.contiguous()
    return x if is_aligned(x) else x.clone()


def integers(values: Any) -> Tensor:
    """Integers that a launcher reads in the memory of the host."""
    return torch.tensor(values, dtype=torch.int64, device="cpu")


def level_table(levels: list[Tensor]) -> Tensor:
    """(levels, 8) int64: address, channels, height, width and strides of each."""
    return integers([(x.data_ptr(), *x.shape[1:], *x.stride()) for x in levels])


@cache
def _band(n: int, size: int, sigma: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Kept: a captured graph reads it for as long as it is replayed."""
    first, taps = axis_band(n, size, sigma)
    return first.to(device), taps.to(device)


def bands(x: Tensor, size: list[int], sigma: float) -> list[Tensor | int]:
    """What ``anomaly_map`` does along each axis of maps (N, h, w), in the order of its arguments."""
    arguments: list[Tensor | int] = []
    for n, outputs in zip(x.shape[1:], size, strict=True):
        first, taps = _band(n, outputs, sigma, x.device)
        arguments += [first, taps, taps.shape[1]]
    return arguments
