"""npad/ops/_cuda.py on the CPU emulator."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from simt_device import Simt
from torch import Tensor

from npad import ops
from npad.ops import _cuda


class _Sizes:
    """Functions of sizes alone, as the extension has them."""

    def __init__(self, simt: Simt) -> None:
        self._simt = simt

    def __getattr__(self, name: str) -> Any:
        return partial(self._simt.number, name)


def _in_c(argument: Any) -> Any:
    if isinstance(argument, torch.dtype):
        return ctypes.c_int(ops.FACTOR_DTYPES.index(argument))  # in the order of DataType
    if isinstance(argument, bool):
        return ctypes.c_bool(argument)
    return ctypes.c_double(argument) if isinstance(argument, float) else argument


def use(
    simt: Simt,
    set_: Callable[[Any, str, Any], None] = setattr,
    then: Callable[[str, tuple[Any, ...]], None] = lambda op, arguments: None,
    wrapped: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda kernel: kernel,
    reached: Sequence[Tensor] = (),
) -> None:
    """Run the wrappers, on tensors of the CPU, in place of the dispatcher, which would see the CPU.

    Parameters
    ----------
    simt : what their launchers run on
    set_ : sets an attribute, perhaps for a while
    then : gets the name and the arguments of each launch that has been
    wrapped : what is run of a wrapper
    reached : what kernels read through addresses in other arguments
    """

    def run(op: str, x: Tensor, *arguments: Any) -> None:
        simt.once(op, *map(_in_c, arguments), reached=reached)
        then(op, arguments)

    class Dispatcher:
        def __getattr__(self, name: str) -> Any:
            return wrapped(getattr(_cuda, name, getattr(ops.reference, name)))

    set_(_cuda, "cuda", _Sizes(simt))
    set_(ops.reference, "centroid_index_dtype", lambda device: torch.uint8)
    set_(_cuda, "_run", run)
    set_(torch.ops, "npad", Dispatcher())
