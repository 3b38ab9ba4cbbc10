"""CUDA graphs: a queue of kernels is recorded once and started again as one."""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

__all__ = ["Graphs"]

Function = Callable[[Tensor], tuple[Tensor, ...]]

_recording = threading.Lock()  # torch allows one recording at a time, whatever the GPU
KEPT = 4  # shapes: the batch, the rest of a folder, one image, and one to spare


class _Device:
    """What all graphs of a GPU share.

    They run one after another on one stream, so that one pool of memory serves the intermediate
    results of every batch size of every model.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream: Any = torch.cuda.Stream(device)
        self.pool: Any = torch.cuda.graph_pool_handle()
        self.lock = threading.Lock()
        self.records = True  # until a recording has failed


_device = cache(_Device)


@dataclass(frozen=True, eq=False)
class _Graph:
    graph: Any
    source: Tensor
    results: tuple[Tensor, ...]


class Graphs:
    """A function on a GPU, recorded as one CUDA graph for each of the latest few input shapes.

    The first call with a shape runs the function as it is and records it; later ones replay it. Once a
    recording has failed, nothing more is recorded on that GPU: what is not recorded runs as it is. Safe
    from several threads and streams: the results are copies, ready for the caller's stream.

    Parameters
    ----------
    function : of one tensor on the GPU; it must queue the same work whatever the values, and wait
        for nothing
    """

    def __init__(self, function: Function) -> None:
        self._function = function
        self._graphs: OrderedDict[torch.Size, _Graph] = OrderedDict()

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

    @property
    def n_recorded(self) -> int:
        """Input shapes that have a graph now."""
        return len(self._graphs)

    def _run(self, x: Tensor, shared: _Device) -> tuple[Tensor, ...]:
        if x.shape not in self._graphs:
            results = self._function(x)  # what is set up at a first call must not be recorded
            if shared.records:
                self._keep(x, shared)
            return results
        self._graphs.move_to_end(x.shape)
        graph = self._graphs[x.shape]
        graph.source.copy_(x)
        graph.graph.replay()
        return tuple(result.clone() for result in graph.results)

    def _keep(self, x: Tensor, shared: _Device) -> None:
        while len(self._graphs) >= KEPT:
            self._graphs.popitem(last=False)
        graph = _record(self._function, x, shared)
        if graph is None:
            shared.records = False
        else:
            self._graphs[x.shape] = graph


def _record(function: Function, x: Tensor, shared: _Device) -> _Graph | None:
    """The graph, or None where it cannot be made."""
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
        _leave(x.device, shared.pool)
        reason = str(error.__context__ or error).strip().splitlines()[0]
        warnings.warn(
            f"npad: the work on a batch of {len(x)} could not be recorded as a CUDA graph ({reason}); "
            f"until this process ends, what is not recorded yet runs without one on {x.device}, a "
            "little slower",
            RuntimeWarning,
            stacklevel=5,
        )
        return None
    return _Graph(graph, source, results)


def _leave(device: torch.device, pool: Any) -> None:
    """Let the allocator leave the pool of a recording that has failed.

    Before PyTorch 2.12 it stays there, and gives back no memory that two streams have used. Where it
    has left already, it says so by an error.
    """
    with suppress(RuntimeError):
        torch._C._cuda_endAllocateToPool(device.index, pool)
