"""CUDA graphs: what is recorded, kept and copied, with a recorder that needs no GPU."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from npad.scoring import cuda_graphs
from npad.scoring.cuda_graphs import KEPT, Graphs


class Stream:
    def wait_stream(self, other: Stream) -> None:
        assert isinstance(other, Stream)


class Recorder:
    """Stands in for torch.cuda.graph and its graphs: replaying writes into what was recorded."""

    def __init__(self) -> None:
        self.tried: list[int] = []  # batches
        self.recorded: list[int] = []
        self.replayed: list[int] = []
        self.fails = False

    def record(self, function: Callable[..., Any], x: Tensor, shared: Any) -> Any:
        self.tried.append(len(x))
        if self.fails:
            return None
        source = x.clone()
        results = function(source)
        self.recorded.append(len(x))

        def replay() -> None:
            self.replayed.append(len(source))
            for result, value in zip(results, function(source), strict=True):
                result.copy_(value)

        return SimpleNamespace(graph=SimpleNamespace(replay=replay), source=source, results=results)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    shared = SimpleNamespace(stream=Stream(), lock=threading.Lock(), records=True)
    monkeypatch.setattr(cuda_graphs, "_device", lambda device: shared)
    monkeypatch.setattr(cuda_graphs, "_record", recorder.record)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(Tensor, "record_stream", lambda self, stream: None)
    return recorder


def double(x: Tensor) -> tuple[Tensor, ...]:
    return 2 * x, x.sum(1)


def test_the_first_call_records_and_later_ones_replay(recorder: Recorder) -> None:
    graphs = Graphs(double)
    inputs = [torch.randn(3, 2) for _ in range(4)]
    results = [graphs(x) for x in inputs]
    assert (recorder.recorded, recorder.replayed) == ([3], [3, 3, 3])
    for x, (a, b) in zip(inputs, results, strict=True):  # not what a later replay has written
        assert torch.equal(a, 2 * x)
        assert torch.equal(b, x.sum(1))


def test_recorded_in_inference_mode_and_replayed_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: nullcontext())
    shared: Any = SimpleNamespace(stream=None, pool=None)
    x = torch.ones(3, 2)
    with torch.inference_mode():
        graph = cuda_graphs._record(double, x, shared)
    assert graph is not None
    graph.source.copy_(2 * x)


def test_a_graph_for_each_of_the_latest_shapes(recorder: Recorder) -> None:
    graphs = Graphs(double)
    for n in range(1, KEPT + 1):
        graphs(torch.ones(n, 2))
    graphs(torch.ones(1, 2))  # now the latest
    graphs(torch.ones(KEPT + 1, 2))  # in place of 2
    graphs(torch.ones(1, 2))
    assert recorder.replayed == [1, 1]
    graphs(torch.ones(2, 2))
    assert recorder.recorded == [*range(1, KEPT + 2), 2]


def test_what_cannot_be_recorded_runs_as_it_is(recorder: Recorder) -> None:
    recorder.fails = True
    graphs = Graphs(double)
    for _ in range(3):
        x = torch.randn(2, 5)
        assert torch.equal(graphs(x)[0], 2 * x)
    assert (recorder.tried, recorder.replayed) == ([2], [])


def test_after_a_failure_nothing_more_is_recorded_and_what_was_is_replayed(
    recorder: Recorder,
) -> None:
    """By any model on that GPU."""
    graphs, others = Graphs(double), Graphs(double)
    graphs(torch.ones(1, 2))
    recorder.fails = True
    graphs(torch.ones(2, 2))
    recorder.fails = False
    for x in (torch.ones(3, 2), torch.ones(2, 2), torch.ones(1, 2)):
        assert torch.equal(graphs(x)[0], 2 * x)
        assert torch.equal(others(x)[0], 2 * x)
    assert (recorder.tried, recorder.replayed) == ([1, 2], [1])


@pytest.mark.parametrize("left", [False, True])
def test_a_failed_recording_says_why(left: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the allocator leaves its pool, if it has not done so by itself."""
    pools = []

    def end(device: int | None, pool: str) -> None:
        pools.append(pool)
        if left:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")

    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: nullcontext())

    def short(x: Tensor) -> tuple[Tensor, ...]:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    shared: Any = SimpleNamespace(stream=None, pool="shared")
    with pytest.warns(RuntimeWarning, match=r"batch of 7 could not .* \(CUDA out of memory"):
        assert cuda_graphs._record(short, torch.ones(7, 2), shared) is None
    assert pools == ["shared"]
