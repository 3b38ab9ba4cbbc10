"""Contenders timed in turn in one run, and the machine's ceilings measured in that run."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from npad import info

Contenders = dict[str, Callable[[], object]]
_ROWS: list[tuple[str, int, dict[str, float]]] = []


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


@cache
def _ceilings(threads: int) -> dict[str, float]:
    """Bandwidth of a large copy, bytes read and written, and rate of a large matrix product."""
    source = torch.randn(2**26)
    target = torch.empty_like(source)
    a = torch.randn(2048, 2048)
    copy = min(_seconds(lambda: target.copy_(source)) for _ in range(5))
    product = min(_seconds(lambda: a @ a) for _ in range(5))
    return {
        "copy_bytes_per_s": 2 * source.nbytes / copy,
        "product_flops_per_s": 2 * 2048**3 / product,
    }


@pytest.fixture(params=[1, 2], ids=["1-thread", "2-threads"])
def threads(request: pytest.FixtureRequest) -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def race(benchmark: Any, request: pytest.FixtureRequest) -> Any:
    """race(contenders, rounds, bytes, flops): medians, taken in turn; "npad" must be among them.

    The machine is noisy: each round runs every contender once, so that all see the same noise, and
    the ratios of the medians are what counts. pytest-benchmark records npad's own rounds.
    """

    def run(
        contenders: Contenders, *, rounds: int = 9, n_bytes: int = 0, n_flops: int = 0
    ) -> dict[str, float]:
        for function in contenders.values():
            function()
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(rounds):
            for name, function in contenders.items():
                times[name].append(_seconds(function))
        medians = {name: statistics.median(values) for name, values in times.items()}
        own = iter(times["npad"])
        benchmark.pedantic(lambda: time.sleep(0), rounds=1)
        benchmark.stats.stats.data.clear()
        benchmark.stats.stats.data.extend(own)
        threads = torch.get_num_threads()
        ceilings = _ceilings(threads)
        floor = max(
            n_bytes / ceilings["copy_bytes_per_s"], n_flops / ceilings["product_flops_per_s"]
        )
        benchmark.extra_info.update(
            threads=threads,
            medians_s=medians,
            ratios={name: value / medians["npad"] for name, value in medians.items()},
            bytes=n_bytes,
            flops=n_flops,
            of_roofline=floor / medians["npad"],
            **ceilings,
        )
        _ROWS.append((request.node.name, threads, medians))
        return medians

    return run


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.filterwarnings("default"))  # the peers' warnings are not ours


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: Any) -> None:
    machine_info["npad"] = info()
    machine_info["processor_name"] = platform.processor()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for name, _, medians in _ROWS:
        own = medians["npad"]
        line = ", ".join(
            f"{other} {value / own:.2f}x" for other, value in medians.items() if other != "npad"
        )
        terminalreporter.write_line(f"{name}: npad {own * 1e3:.2f} ms; {line}")
