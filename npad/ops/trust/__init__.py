"""On which GPU which kernels may run: none gives a wrong score because nobody has tried it there.

The first op on a GPU finds it out, from the build's architectures and from a check in a child process
whose verdict is kept on the disk. From then on it is a look into a dict. Nothing here touches the GPU,
so that it does not matter what the stream is doing.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from npad._version import __version__
from npad.ops._extension import core, cuda
from npad.ops._schemas import OPS
from npad.ops.trust import children, verdicts
from npad.ops.trust.architectures import covers
from npad.ops.trust.findings import Finding
from npad.ops.trust.verdicts import Faults, Key

__all__ = ["check", "failed"]

_DRIVER = Path("/proc/driver/nvidia/version")
_failed: dict[int, frozenset[str]] = {}  # by the index of the GPU
_lock = threading.Lock()


@dataclass(frozen=True)
class Gpu:
    """What is known about a GPU without asking it."""

    index: int
    name: str
    capability: tuple[int, int]
    uuid: str

    @staticmethod
    def of(index: int) -> Gpu:
        """The GPU of an index."""
        known = torch.cuda.get_device_properties(index)
        return Gpu(index, known.name, (known.major, known.minor), str(known.uuid))

    def __str__(self) -> str:
        return f"cuda:{self.index} ({self.name})"

    @property
    def key(self) -> Key:
        """Under which its verdict is kept."""
        return {"npad": __version__, "build": _build(), "gpu": self.name, "driver": _driver()}

    @property
    def uncovered(self) -> str:
        """That the build has no code for it, and what to do; empty where it has."""
        if covers(cuda.architectures, self.capability):
            return ""
        major, minor = self.capability
        return (
            f"{self} has compute capability {major}.{minor}, for which this build of npad has neither "
            f"machine code nor PTX (it was built for {cuda.architectures.replace(',', ', ')}); the "
            f"slower PyTorch reference runs there. Build npad with CUDAARCHS={major}{minor} in the "
            "environment"
        )


@cache
def _build() -> str:
    return hashlib.sha256(Path(core.__file__).read_bytes()).hexdigest()


def _driver() -> str:
    """The version of the driver, or of its CUDA where the system does not show the driver's own."""
    try:
        shown = re.search(r"\d+(?:\.\d+)+", _DRIVER.read_text(encoding="utf-8"))
    except OSError:
        shown = None
    return shown[0] if shown else f"CUDA {cuda.driver_version()}"


def failed(index: int) -> frozenset[str]:
    """Ops that a GPU must run by the reference.

    Warns
    -----
    RuntimeWarning
        Once for each GPU: there are such ops, or the kernels could not be checked.
    """
    found = _failed.get(index)
    return _find_out(index) if found is None else found


def _find_out(index: int) -> frozenset[str]:
    with _lock:
        if index in _failed:  # another thread was first
            return _failed[index]
        found, text = _judge(Gpu.of(index))
        _failed[index] = found
    if text:
        warnings.warn(f"npad: {text}", RuntimeWarning, stacklevel=2)
    return found


def _judge(gpu: Gpu) -> tuple[frozenset[str], str]:
    """Ops that must not run there, and what is to be said."""
    if gpu.uncovered:
        return frozenset(OPS), gpu.uncovered
    if os.environ.get("NPAD_CHECK") == "0":
        return frozenset(), ""
    command = f"`npad check --device cuda:{gpu.index}`"
    key = gpu.key
    faults = verdicts.kept(key)
    if faults is None:
        try:
            faults = _faults(list(children.findings(gpu.uuid, full=False)))
        except children.UncheckedError as error:
            return frozenset(), (
                f"the kernels could not be checked on {gpu} and run unchecked ({error}); run "
                f"{command}, or set NPAD_CHECK=0 to go without"
            )
        verdicts.keep(key, faults)
    if not faults:
        return frozenset(), ""
    listed = "; ".join(f"{op} ({fault})" for op, fault in faults.items())
    return frozenset(faults), (
        f"kernels failed their check on {gpu}, driver {key['driver']}: {listed}. The slower PyTorch "
        f"reference runs in their place. Please report it with what {command} --json prints; after a "
        f"change to the machine, {command} checks again"
    )


def _faults(findings: list[Finding]) -> Faults:
    return {found.op: found.fault for found in findings if found.fault is not None}


def check(device: torch.device) -> list[Finding]:
    """Check every kernel in full; the verdict on a GPU replaces the one that was kept.

    Parameters
    ----------
    device : a CPU, or a GPU with its index

    Raises
    ------
    RuntimeError
        The build has no code for the GPU, or the check could not be made.
    """
    gpu = Gpu.of(device.index) if device.type == "cuda" else None
    if gpu is not None and gpu.uncovered:
        raise RuntimeError(gpu.uncovered)
    try:
        findings = list(children.findings(gpu.uuid if gpu is not None else "cpu", full=True))
    except children.UncheckedError as error:
        raise RuntimeError(
            f"the kernels could not be checked on {gpu or device}: {error}"
        ) from error
    if gpu is not None:
        verdicts.keep(gpu.key, _faults(findings))
    return findings
