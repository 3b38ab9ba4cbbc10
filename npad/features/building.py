"""Building a network of another package, whatever the program around has set."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from npad import devices

__all__ = ["building"]

# What fills a tensor with random numbers: a method of it, or a function of torch.nn.init.
_FILL: Final = re.compile(
    "(bernoulli|exponential|random|orthogonal|(trunc_|kaiming_|xavier_)?(normal|uniform))_"
)


class _Unfilled(TorchFunctionMode):
    """Zeros in place of random numbers, and float32 where another default dtype would be taken."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if _FILL.fullmatch(getattr(func, "__name__", "")):
            return (args[0] if args else kwargs["tensor"]).zero_()
        if func in (torch.rand, torch.randn):
            func = torch.zeros
            kwargs.pop("generator", None)
        result = func(*args, **kwargs)
        default = torch.get_default_dtype()
        if default != torch.float32 and kwargs.get("dtype") is None:
            given = [x.dtype for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
            if isinstance(result, Tensor) and result.dtype == default and default not in given:
                return result.float()
        return result


@contextmanager
def building() -> Iterator[None]:
    """Modules are made on the CPU in float32; their weights, which are loaded later, are zeros.

    So the random numbers of the program stay its own. As for what other threads see, nothing is set.
    """
    cpu = torch.device("cpu")
    with devices.plain(cpu), cpu, _Unfilled():
        yield
