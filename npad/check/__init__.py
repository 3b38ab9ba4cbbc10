"""Are the kernels right on this device: every op against its reference in float64."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from npad.check.accuracy import WrongError, error_over_bound
from npad.check.cases import CASES, Arguments, Case, on, tensors
from npad.ops.trust.findings import Finding

__all__ = ["Clock", "examine"]

SIZES = (1, 7, 8, 31, 129, 384)
FEW_SIZES = (8, 31, 129)  # of the variants
ROUNDS = 5


def examine(name: str, device: torch.device, clock: Clock | None = None) -> Finding:
    """Run an op on a device, on small, odd and large shapes.

    Parameters
    ----------
    name : of the op, in `npad.check.cases`
    device : with its index
    clock : of the device; None leaves out the times

    Returns
    -------
    What was found. A launch that fails is an error: after some of them, nothing runs in the process.

    Raises
    ------
    RuntimeError
        The kernel could not be launched, or has failed on the device.
    """
    case = CASES[name]
    worst = 0.0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for label, arguments in _shapes(case):
            try:
                error = _error(case, device, arguments)
            except WrongError as wrong:
                return Finding(name, f"{label}: {wrong}")
            if error > 1:
                shown = round(error, 3) if math.isfinite(error) else None
                return Finding(
                    name, f"{label}: the error is {error:.3g} times what is allowed", shown
                )
            worst = max(worst, error)
    times = {} if clock is None else clock.times(case, arguments)  # of the last, which are large
    return Finding(name, None, round(worst, 3), **times)


def _shapes(case: Case) -> Iterator[tuple[str, Arguments]]:
    for size in SIZES:
        yield f"size {size}", case.make(size)
    for label, make in case.variants.items():
        for size in FEW_SIZES:
            yield f"size {size}, {label}", make(size)
    yield "large", case.large()


def _error(case: Case, device: torch.device, arguments: Arguments) -> float:
    there = on(device, arguments)
    actual, again = ([t.cpu() for t in tensors(case.op(*there))] for _ in range(2))
    working = tensors(case.reference(*arguments))
    oracle = tensors(case.reference(*on("cpu", arguments, torch.float64)))
    error = max(map(error_over_bound, actual, working, oracle))
    if not all(map(torch.equal, actual, again)):
        raise WrongError("a second run gives other bits")
    return error


class Clock:
    """Times ops beside a copy that is larger than all caches, in turn with it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._source = torch.zeros(2**27 if device.type == "cuda" else 2**26, device=device)
        self._target = torch.zeros_like(self._source)

    def times(self, case: Case, arguments: Arguments) -> dict[str, float]:
        """Of an op: median milliseconds, and the share of the bandwidth of the copy."""
        there = on(self._device, arguments)
        moved = [t for t in (*there, *tensors(case.op(*there))) if isinstance(t, Tensor)]
        run = partial(case.timed or case.op, *there)
        pairs = [self._pair(run) for _ in range(ROUNDS)]
        copy, seconds = map(statistics.median, zip(*pairs, strict=True))
        share = sum(t.nbytes for t in moved) / seconds / (2 * self._source.nbytes / copy)
        return {"milliseconds": round(1e3 * seconds, 4), "of_bandwidth": round(share, 3)}

    def _pair(self, run: Callable[[], object]) -> tuple[float, float]:
        """Seconds of the copy, and of an op that follows at once: on a GPU, it is queued by then."""
        if self._device.type == "cpu":
            times = [time.perf_counter()]
            for function in (self._copy, run):
                function()
                times.append(time.perf_counter())
            return times[1] - times[0], times[2] - times[1]
        with torch.cuda.device(self._device):
            begin, between, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
            begin.record()
            self._copy()
            between.record()
            run()
            end.record()
            end.synchronize()
            return begin.elapsed_time(between) / 1e3, between.elapsed_time(end) / 1e3

    def _copy(self) -> None:
        self._target.copy_(self._source)
