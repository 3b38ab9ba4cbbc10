"""CUDA graphs: a queue of kernels is recorded once and started again as one."""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

__all__ = ["SAFE", "Graphs"]

Function = Callable[[Tensor], tuple[Tensor, ...]]

# Before PyTorch 2.12, a recording that fails leaves the allocator unable to free memory.
SAFE = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 12)

_recording = threading.Lock()  # torch allows one recording at a time, whatever the GPU
KEPT = 4  # shapes: the batch, the rest of a folder, one image, and one to spare


@dataclass(frozen=True, eq=False)
class _Device:
    """What all graphs of a GPU share.

    They run one after another on one stream, so that one pool of memory serves the intermediate
    results of every batch size of every model.
    """

    device: torch.device
    stream: Any = field(init=False)
    pool: Any = field(init=False)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        object.__setattr__(self, "stream", torch.cuda.Stream(self.device))
        object.__setattr__(self, "pool", torch.cuda.graph_pool_handle())


_device = cache(_Device)


@dataclass(frozen=True, eq=False)
class _Graph:
    graph: Any
    source: Tensor
    results: tuple[Tensor, ...]


class Graphs:
    """A function on a GPU, recorded as one CUDA graph for each of the latest few input shapes.

    The first call with a shape runs the function as it is and records it; later ones replay it. Safe
    from several threads and streams: the results are copies, ready for the caller's stream.

    Parameters
    ----------
    function : of one tensor on the GPU; it must queue the same work whatever the values, and wait
        for nothing
    """

    def __init__(self, function: Function) -> None:
        self._function = function
        self._graphs: OrderedDict[torch.Size, _Graph | None] = OrderedDict()

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """Call the function; nothing waits for the GPU."""
        shared = _device(x.device)
        with shared.lock, torch.cuda.device(x.device):
            caller = torch.cuda.current_stream()
            shared.stream.wait_stream(caller)
            with torch.cuda.stream(shared.stream):
                x.record_stream(shared.stream)
                results = self._run(x, shared)
            caller.wait_stream(shared.stream)
            for result in results:
                result.record_stream(caller)
        return results

    def _run(self, x: Tensor, shared: _Device) -> tuple[Tensor, ...]:
        if x.shape not in self._graphs:
            results = self._function(x)  # what is set up at a first call must not be recorded
            while len(self._graphs) >= KEPT:
                self._graphs.popitem(last=False)
            self._graphs[x.shape] = _record(self._function, x, shared)
            return results
        self._graphs.move_to_end(x.shape)
        graph = self._graphs[x.shape]
        if graph is None:
            return self._function(x)
        graph.source.copy_(x)
        graph.graph.replay()
        return tuple(result.clone() for result in graph.results)


def _record(function: Function, x: Tensor, shared: _Device) -> _Graph | None:
    """The graph, or None where it cannot be made: the function then goes on running as it is."""
    with torch.inference_mode(False):  # what was made inside it could not be written to outside
        source = x.clone()
    graph = torch.cuda.CUDAGraph()
    try:
        # Other threads may allocate meanwhile, which the default mode forbids.
        with (
            _recording,
            torch.cuda.graph(
                graph, pool=shared.pool, stream=shared.stream, capture_error_mode="thread_local"
            ),
        ):
            results = function(source)
    except RuntimeError as error:
        reason = str(error.__context__ or error).strip().splitlines()[0]
        warnings.warn(
            f"npad: the work on a batch of {len(x)} could not be recorded as a CUDA graph ({reason}); "
            "it runs without one, a little slower",
            RuntimeWarning,
            stacklevel=4,
        )
        return None
    return _Graph(graph, source, results)
