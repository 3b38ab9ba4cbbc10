"""Contenders timed in turn in one run, and the machine's ceilings measured in that run.

A benchmark marked ``cases(cpu=[...], cuda=[...])`` takes a ``device`` and a ``case``, a named tuple of
its sizes, and runs there; one that takes ``threads`` alone runs on the CPU.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from provenance import provenance
from torch import Tensor

from npad import info

Contenders = dict[str, Callable[[], object]]
Seconds = Callable[[Callable[[], object]], float]
_ROWS: list[tuple[str, dict[str, float]]] = []
collect_ignore = ["bench_peers.py"]  # a program
os.environ["NPAD_CHECK"] = "0"  # a kernel that is wrong must not be replaced by the reference here
_PLACES = {"cpu": ["1-thread", "2-threads"], "cuda": ["cuda"]}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", help="add a line of JSON to this file after each benchmark")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marker = metafunc.definition.get_closest_marker("cases")
    if marker is None:
        if "device" in metafunc.fixturenames:
            metafunc.parametrize("device", _PLACES["cpu"], indirect=True)
        return
    runs = [
        pytest.param(
            place, case, id="-".join([*(f"{k}{v}" for k, v in case._asdict().items()), place])
        )
        for kind, cases in marker.kwargs.items()
        for case in cases
        for place in _PLACES[kind]
    ]
    metafunc.parametrize(("device", "case"), runs, indirect=["device"])


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """The GPU, or the CPU with as many threads as the parameter says."""
    before = torch.get_num_threads()
    if request.param == "cuda":
        if not (torch.cuda.is_available() and info()["kernels"].get("cuda")):
            required = os.environ.get("NPAD_REQUIRE_CUDA") == "1"
            (pytest.fail if required else pytest.skip)("no GPU, or no CUDA kernels")
        yield torch.device("cuda", 0)
        gc.collect()
        torch.cuda.empty_cache()
    else:
        torch.set_num_threads(int(request.param.split("-")[0]))
        yield torch.device("cpu")
        torch.set_num_threads(before)


@pytest.fixture
def threads(device: torch.device) -> int:
    """Number of threads that the benchmark runs with."""
    return torch.get_num_threads()


@cache
def _larger_than_caches() -> Tensor:
    """Two parts, which take so long that all launches of a contender queue up behind them."""
    return torch.zeros(2, 2**27, device="cuda")


def _seconds_of(device: torch.device) -> Seconds:
    def on_cpu(function: Callable[[], object]) -> float:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    def on_gpu(function: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        written, read = _larger_than_caches()
        written.zero_()
        read.sum()  # or what was written would go to memory at the expense of the next to come
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return on_gpu if device.type == "cuda" else on_cpu


@pytest.fixture
def seconds(device: torch.device) -> Seconds:
    """seconds(function): of one call; on a GPU with cold caches and between two events."""
    return _seconds_of(device)


@cache
def _ceilings(device: torch.device, threads: int) -> dict[str, float]:
    """Bandwidth of a large copy, bytes read and written, and rates of large matrix products."""
    seconds = _seconds_of(device)

    def least(function: Callable[[], object]) -> float:
        return min(seconds(function) for _ in range(5))

    gpu = device.type == "cuda"
    source = torch.randn(2**28 if gpu else 2**26, device=device)
    target = torch.empty_like(source)
    found = {"copy_bytes_per_s": 2 * source.nbytes / least(lambda: target.copy_(source))}
    side = 8192 if gpu else 2048
    a, b = torch.randn(2, side, side, device=device)
    found["float32_flops_per_s"] = 2 * side**3 / least(lambda: a @ b)
    if gpu:
        torch.set_float32_matmul_precision("high")
        found["tf32_flops_per_s"] = 2 * side**3 / least(lambda: a @ b)
        torch.set_float32_matmul_precision("highest")
        half_a, half_b = a.half(), b.half()
        found["float16_flops_per_s"] = 2 * side**3 / least(lambda: half_a @ half_b)
    return found


@pytest.fixture
def ceilings(device: torch.device) -> dict[str, float]:
    """What this run measured of the machine: see _ceilings()."""
    return _ceilings(device, torch.get_num_threads())


@pytest.fixture
def compiled(device: torch.device) -> Iterator[Callable[[Callable[[], Tensor]], Contenders]]:
    """compiled(function): its torch.compile form as a contender, on a GPU where Triton works."""

    def compile_and_try(function: Callable[[], Tensor]) -> Contenders:
        if device.type != "cuda":
            return {}
        fast = torch.compile(function, dynamic=False)
        try:
            fast()
        except Exception as error:  # the other contenders are worth a measurement without it
            warnings.warn(f"torch.compile: {str(error).splitlines()[0]}", stacklevel=2)
            return {}
        return {"compiled": fast}

    yield compile_and_try
    torch._dynamo.reset()


@pytest.fixture
def race(
    benchmark: Any,
    request: pytest.FixtureRequest,
    device: torch.device,
    seconds: Seconds,
    ceilings: dict[str, float],
) -> Any:
    """race(contenders, rounds, n_bytes, n_flops, products): medians; "npad" must be among them.

    The machine is noisy: each round runs every contender once, so that all see the same noise, and
    the ratios of the medians are what counts. pytest-benchmark records npad's own rounds. On a GPU
    npad's kernel does each product in ``products = (dtype, times)``, which is what its roofline
    assumes.
    """

    def run(
        contenders: Contenders,
        *,
        rounds: int = 9,
        n_bytes: int = 0,
        n_flops: int = 0,
        products: tuple[str, int] = ("float32", 1),
    ) -> dict[str, float]:
        for function in contenders.values():
            function()
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(rounds):
            for name, function in contenders.items():
                times[name].append(seconds(function))
        medians = {name: statistics.median(values) for name, values in times.items()}
        benchmark.pedantic(lambda: time.sleep(0), rounds=1)
        benchmark.stats.stats.data.clear()
        benchmark.stats.stats.data.extend(times["npad"])
        dtype, repeats = products if device.type == "cuda" else ("float32", 1)
        moving = n_bytes / ceilings["copy_bytes_per_s"]
        multiplying = repeats * n_flops / ceilings[f"{dtype}_flops_per_s"]
        params = request.node.callspec.params
        benchmark.extra_info.update(
            device=device.type,
            case=params["case"]._asdict() if "case" in params else {},
            threads=torch.get_num_threads(),
            medians_s=medians,
            ratios={name: value / medians["npad"] for name, value in medians.items()},
            bytes=n_bytes,
            flops=n_flops,
            of_bandwidth=moving / medians["npad"],
            of_roofline=max(moving, multiplying) / medians["npad"],
            ceilings=ceilings,
        )
        _ROWS.append((request.node.name, medians))
        return medians

    return run


@pytest.fixture(autouse=True)
def results(request: pytest.FixtureRequest, benchmark: Any) -> Iterator[None]:
    """What was measured is on disk at once, whatever happens to the benchmarks that follow."""
    yield
    path = request.config.getoption("--results")
    if path and benchmark.extra_info:
        record = {
            "group": benchmark.group,
            "name": benchmark.name,
            "extra_info": benchmark.extra_info,
        }
        with Path(path).open("a") as file:
            file.write(json.dumps(record) + "\n")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.filterwarnings("default"))  # the peers' warnings are not ours


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: Any) -> None:
    machine_info["npad"] = provenance()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for name, medians in _ROWS:
        own = medians["npad"]
        line = ", ".join(
            f"{other} {value / own:.2f}x" for other, value in medians.items() if other != "npad"
        )
        terminalreporter.write_line(f"{name}: npad {own * 1e3:.2f} ms; {line}")
