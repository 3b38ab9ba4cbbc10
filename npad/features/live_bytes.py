"""How much memory a computation holds at once, counted without doing it."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["LiveBytes"]


class LiveBytes(TorchDispatchMode):
    """While it is entered, counts the bytes of the tensors that operations make and let go.

    On the meta device, where only shapes are computed, that costs no memory. What was there before is
    not counted, nor what a kernel takes for itself and gives back before it returns.

    Attributes
    ----------
    now : bytes at present
    peak : the most so far
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        known = {id(x.untyped_storage()) for x in _tensors((args, kwargs))}  # views, and in place
        for x in _tensors(result):
            storage = x.untyped_storage()
            if id(storage) not in known:
                known.add(id(storage))
                self._change(storage.nbytes())
                weakref.finalize(storage, self._change, -storage.nbytes())
        return result

    def _change(self, n_bytes: int) -> None:
        self.now += n_bytes
        self.peak = max(self.peak, self.now)


def _tensors(values: Any) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]
