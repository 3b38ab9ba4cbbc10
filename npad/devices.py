"""Devices: which one is meant, how much memory is free on it, what its failures mean."""

from __future__ import annotations

import gc
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from npad.free_memory import free_memory

__all__ = [
    "Halving",
    "exact_products",
    "explained",
    "free_bytes",
    "plain",
    "require",
    "resolve",
    "shown_size",
]

LESS_MEMORY = "lower batch_size, image_size, n_features or n_centroids"
_SHORT = re.compile(
    r"DefaultCPUAllocator|cudaErrorMemoryAllocation|CUDA error: out of memory|_STATUS_ALLOC_FAILED"
)
# What leaves a GPU usable: a kernel that it has no code for, an argument, a recording.
_LOST = re.compile(
    r"CUDA error: (?!no kernel image|invalid (?:argument|configuration|device)"
    r"|operation (?:not permitted|failed))"
    r"|cudaError(?!NoKernelImage|Invalid(?:Value|Configuration|Device)|StreamCapture)"
    r"|device-side assert|Xid"
)


def resolve(value: Any) -> torch.device:
    """The torch device that is meant, on which tensors can be made; "auto" is a GPU if there is one.

    Raises
    ------
    ValueError
        No device, or one that cannot be used here.
    """
    if value == "auto":
        value = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(value)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            "NPad: device must be a torch device such as 'cpu' or 'cuda:0', or 'auto', "
            f"got {value!r}"
        ) from error
    try:
        if found.type == "meta":  # a model moved there would lose its values
            raise RuntimeError("it holds no values")
        return torch.empty(0, device=found).device  # with its index
    except Exception as error:  # torch raises RuntimeError, AssertionError, NotImplementedError
        first_sentence = re.split(r"\n|\. ", str(error).strip())[0]
        raise ValueError(
            f"NPad: device='{found}' cannot be used here ({first_sentence}); "
            "give device='cpu', or one that `npad info` shows"
        ) from error


def free_bytes(device: torch.device) -> int | None:
    """Memory that can still be had on a device, or None where that cannot be known."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    return free_memory() if device.type == "cpu" else None


def require(n_bytes: int, device: torch.device, call: str, purpose: str, remedy: str) -> None:
    """Refuse before the work what cannot fit: Linux would promise the memory and kill us later.

    Raises
    ------
    MemoryError
        What was asked for, what is free, and what lowers it.
    """
    free = free_bytes(device)
    if free is not None and n_bytes > free:
        raise MemoryError(
            f"{call}: {purpose} needs {shown_size(n_bytes)}, {shown_size(free)} are free on {device}; "
            f"{remedy}"
        )


@contextmanager
def explained(call: str, device: torch.device, remedy: str | None = None) -> Iterator[None]:
    """Turn a lack of memory and a lost GPU into errors that say what to do.

    Raises
    ------
    MemoryError
        What was asked for, what is free, and what lowers it.
    RuntimeError
        The GPU has failed.
    """
    try:
        yield
    except RuntimeError as error:
        if is_shortage(error):
            asked = re.search(r"allocate (\d+(?:\.\d+)?)\s*(bytes|[KMGT]iB)", str(error))
            wanted = "more memory"
            if asked is not None:
                unit = ("bytes", "KiB", "MiB", "GiB", "TiB").index(asked[2])
                wanted = f"{shown_size(float(asked[1]) * 1024**unit)} more"
            free = free_bytes(device)
            left = f", {shown_size(free)} are free" if free is not None else ""
            if remedy is None:
                elsewhere = "" if device.type == "cpu" else ", or use device='cpu'"
                remedy = LESS_MEMORY + elsewhere
            raise MemoryError(
                f"{call}: {wanted} was asked for on {device}{left}; {remedy}"
            ) from error
        if device.type == "cuda" and _LOST.search(str(error)):
            first_line = str(error).strip().splitlines()[0]
            raise RuntimeError(
                f"{call}: {device} has failed ({first_line}) and cannot be used by this process any "
                "more: start it again; if that recurs, look at the driver's log. No file was changed"
            ) from error
        raise


@contextmanager
def plain(device: torch.device) -> Iterator[None]:
    """No gradients and no autocast of the program around: dtypes are the model's.

    Nor its inference mode: a model outlives that, and its tensors would be of no use outside.
    """
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(device.type, enabled=False),
    ):
        yield


class _Exactness:
    """What products of float32 matrices are rounded to, set for as long as somebody asks for float32.

    It is the process's. The first to enter changes it and the last to leave puts it back, so that
    threads need not wait for each other.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._before: list[tuple[Any, str]] = []
        self._before_2_9 = "highest"

    def __enter__(self) -> None:
        with self._lock:
            if self._users == 0:
                self._change()
            self._users += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self._restore()

    def _change(self) -> None:
        backends: Any = torch.backends
        if not hasattr(backends, "fp32_precision"):
            self._before_2_9 = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("highest")
            return
        for parent, own in (
            (backends.cudnn, backends.cuda.matmul),
            (backends.mkldnn, backends.mkldnn.matmul),
            (backends.mkldnn, backends.mkldnn.conv),
        ):
            # The outermost that it inherits from: it alone can be restored as it was.
            for owner in (backends, parent, own):
                precision = owner.fp32_precision
                if own.fp32_precision in ("tf32", "bf16") and precision != "ieee":
                    self._before.append((owner, precision))
                    owner.fp32_precision = "ieee"

    def _restore(self) -> None:
        if not hasattr(torch.backends, "fp32_precision"):
            torch.set_float32_matmul_precision(self._before_2_9)
        while self._before:
            owner, precision = self._before.pop()
            owner.fp32_precision = precision


exact_products = _Exactness()


def is_shortage(error: BaseException) -> bool:
    """Whether an error is a lack of memory, on any device."""
    return isinstance(error, torch.cuda.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and _SHORT.search(str(error)) is not None
    )


class Halving:
    """A function of a batch that is given half as many images at a time once memory is short.

    Parameters
    ----------
    function : of a batch (B, ...), returning tensors whose first axis is the batch
    call : what a warning names
    """

    def __init__(self, function: Callable[[Tensor], tuple[Tensor, ...]], call: str) -> None:
        self._function = function
        self._call = call
        self._most: int | None = None  # images at a time

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """Call the function; the error of a second shortage is the caller's."""
        if self._most is None:
            try:
                return self._function(x)
            except RuntimeError as error:
                if not is_shortage(error) or len(x) == 1:
                    raise
            # Here, where the error and the tensors that its traceback holds are gone.
            self._most = -(-len(x) // 2)
            gc.collect()
            if x.device.type == "cuda":
                torch.cuda.empty_cache()
            warnings.warn(
                f"{self._call}: the memory of {x.device} is too short for batch_size={len(x)}; going "
                f"on with {self._most} at a time",
                RuntimeWarning,
                stacklevel=2,
            )
        parts = [self._function(part) for part in x.split(self._most)]
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def shown_size(n_bytes: float) -> str:
    """As a person reads it."""
    for unit in ("bytes", "KB", "MB"):
        if n_bytes < 1000:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.1f} GB"
