"""Batch normalisation folded into the convolutions before it: the same function, with less to do."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.overrides import TorchFunctionMode

__all__ = ["fold_batch_norm"]

_SIZE = 64  # pixels of the image that is sent through once to see what follows what


class _Record(TorchFunctionMode):
    """Which results of convolutions go into a batch normalisation, and how often each is used."""

    def __init__(self) -> None:
        super().__init__()
        self.uses: Counter[int] = Counter()  # of a tensor, by its id
        self.calls: Counter[int] = Counter()  # of a module, by the id of its first tensor
        self.convolutions: dict[int, int] = {}  # id of a result: id of the weight
        self.pairs: list[tuple[int, int, int]] = []  # ids of weight, running mean and the result
        self._alive: list[object] = []  # so that no id is given twice

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self._alive.append((args, kwargs, result))
        if _tensors([result]):  # not a question of its shape
            self.uses.update({id(x) for x in _tensors([*args, *kwargs.values()])})
        if func in (torch.conv2d, F.conv2d):
            weight = kwargs["weight"] if "weight" in kwargs else args[1]
            self.calls[id(weight)] += 1
            self.convolutions[id(result)] = id(weight)
        elif func is F.batch_norm:
            source, mean = args[0], kwargs["running_mean"] if "running_mean" in kwargs else args[1]
            self.calls[id(mean)] += 1
            if id(source) in self.convolutions:
                self.pairs.append((self.convolutions[id(source)], id(mean), id(source)))
        return result


def _tensors(values: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors(value)
    return found


@torch.no_grad()
def fold_batch_norm(net: nn.Module) -> None:
    """Fold each batch normalisation into the convolution whose result it alone uses, in place.

    Parameters
    ----------
    net : network in evaluation mode that takes (1, 3, 64, 64) and returns a list of features; one
        without batch normalisation, or that does not take such an image, is left as it is

    Notes
    -----
    Computed in float64. What is folded is seen, not guessed: the network is run once and every call
    is recorded, so that a result with a second use, or a layer that is called twice, stays.
    `torch.fx`, whose fusion knows what follows what too, cannot trace every network of timm, nor
    fold a layer that is a normalisation and its activation in one.
    """
    norms = {
        id(module.running_mean): (name, module)
        for name, module in net.named_modules()
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None
    }
    if not norms:
        return
    record = _Record()
    try:
        with record:
            image = torch.zeros(1, 3, _SIZE, _SIZE, dtype=torch.float32, device="cpu")
            outputs = {id(x) for x in _tensors(net(image))}
    except (RuntimeError, ValueError, AssertionError):
        return
    convolutions = {
        id(module.weight): module for module in net.modules() if isinstance(module, nn.Conv2d)
    }
    for weight, mean, result in record.pairs:
        once = record.calls[weight] == record.calls[mean] == record.uses[result] == 1
        if once and result not in outputs and weight in convolutions and mean in norms:
            name, norm = norms[mean]
            _fold(convolutions[weight], norm)
            parent, _, child = name.rpartition(".")
            setattr(net.get_submodule(parent), child, _rest(norm))


def _fold(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    weight, bias = fuse_conv_bn_weights(
        convolution.weight.double(),
        _double(convolution.bias),
        _double(norm.running_mean),
        _double(norm.running_var),
        norm.eps,
        _double(norm.weight),
        _double(norm.bias),
    )
    convolution.weight.copy_(weight)
    convolution.bias = nn.Parameter(bias.to(convolution.weight.dtype), requires_grad=False)


def _double(x: Tensor | None) -> Any:
    return None if x is None else x.double()


def _rest(norm: nn.BatchNorm2d) -> nn.Module:
    """What a layer does after its normalisation: nothing, or the activation of timm's layers."""
    parts = [getattr(norm, name) for name in ("drop", "act") if hasattr(norm, name)]
    return nn.Sequential(*parts) if parts else nn.Identity()
