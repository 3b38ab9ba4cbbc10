"""The CUDA kernels on the CPU, called with tensors: builds and loads the libraries of tests/simt."""

from __future__ import annotations

import ctypes
import fcntl
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from npad.ops._extension import core

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "simt"
ORDERS = (0, 1, 2)  # of the threads' and blocks' turns: forward, reverse, shuffled
LIBRARIES = ("simt_fast", "simt_fma", "simt_sm75", "simt_checked")

# Bytes of shared memory that a block may ask for.
SM75, SM86, SM90 = 64 << 10, 99 << 10, 227 << 10


class LaunchError(RuntimeError):
    """What a launcher returned, with the emulator's report if the kernel ran."""


class Simt:
    """One library of kernels, on a device of so much shared memory; calling it runs a launcher."""

    def __init__(self, library: Path, shared_bytes: int) -> None:
        self._shared_bytes = shared_bytes
        self._library = ctypes.CDLL(str(library))
        self._library.simt_report.restype = ctypes.c_char_p

    def __call__(
        self,
        op: str,
        *args: Tensor | int | None,
        reached: Sequence[Tensor] = (),
        processors: int = 3,
    ) -> None:
        """Run a launcher on CPU tensors, in every order; results must be the same to the bit.

        Tensors are contiguous and become pointers, to which the kernel may touch no byte more than
        the tensor has; None becomes null, integers become int64; the stream is added. A float is
        passed as ``ctypes.c_float(x)``. ``reached`` are tensors whose addresses lie in another
        tensor.
        """
        tensors = [a for a in args if isinstance(a, Tensor)]
        before = [t.clone() for t in tensors]
        results = []
        for order in ORDERS:
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)
            self._run(op, args, reached, order, processors)
            results.append([t.clone() for t in tensors])
        for order, result in zip(ORDERS[1:], results[1:], strict=True):
            for i, (a, b) in enumerate(zip(results[0], result, strict=True)):
                if not torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
                    raise AssertionError(f"{op}: tensor {i} depends on the order ({order})")

    def once(self, op: str, *args: Tensor | int | None, reached: Sequence[Tensor] = ()) -> None:
        """Run a launcher in one order and without copies."""
        self._run(op, args, reached, ORDERS[0], 3)

    def workspace(self, op: str, *sizes: int) -> Tensor:
        """The memory that ``op`` asks for, in bytes that stand for NaN."""
        return torch.full((self.number(f"{op}_workspace", *sizes),), 0xFF, dtype=torch.uint8)

    def number(self, function: str, *sizes: int) -> int:
        """What a function of sizes alone returns."""
        address = ctypes.c_void_p.in_dll(self._library, f"simt_{function}").value
        assert address is not None
        return int(ctypes.CFUNCTYPE(ctypes.c_int64)(address)(*map(ctypes.c_int64, sizes)))

    def _run(
        self,
        op: str,
        args: tuple[Tensor | int | None, ...],
        reached: Sequence[Tensor],
        order: int,
        processors: int,
    ) -> None:
        library = self._library
        launcher = ctypes.c_void_p.in_dll(library, f"simt_{op}").value
        assert launcher is not None
        library.simt_configure(order, processors, ctypes.c_size_t(self._shared_bytes))
        library.simt_clear_buffers()
        named = [(f"argument {i}", a) for i, a in enumerate(args) if isinstance(a, Tensor)]
        named += [(f"reached tensor {i}", tensor) for i, tensor in enumerate(reached)]
        for name, tensor in named:
            assert tensor.is_contiguous()
            begin = ctypes.c_void_p(tensor.data_ptr())
            library.simt_add_buffer(begin, ctypes.c_size_t(tensor.nbytes), name.encode())
        values = []
        for a in args:
            if a is None or isinstance(a, Tensor):
                values.append(ctypes.c_void_p(None if a is None else a.data_ptr()))
            else:
                values.append(ctypes.c_int64(a) if isinstance(a, int) else a)
        values.append(ctypes.c_void_p(None))  # the stream
        error = ctypes.CFUNCTYPE(ctypes.c_int)(launcher)(*values)
        if error != 0:
            raise LaunchError(library.simt_report().decode() or f"{op}: cudaError {error}")


@lru_cache(maxsize=1)
def build() -> str:
    """Build the libraries; returns why they could not be built, if there are no tools for it."""
    cmake = shutil.which("cmake")
    compiler = shutil.which(os.environ.get("CXX", "c++").split()[0])
    if cmake is None or compiler is None:
        return "cmake is not installed" if cmake is None else "there is no C++ compiler"
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the tests may run in several processes
        for command in (
            [cmake, "-S", ROOT, "-B", BUILD, "-DNPAD_BUILD_TESTS=ON", "-DNPAD_CUDA=OFF"],
            [cmake, "--build", BUILD, "--target", *LIBRARIES],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise RuntimeError(f"{done.stdout}{done.stderr}")
    return ""


@lru_cache
def load(name: str, shared_bytes: int | None = None) -> Simt:
    """One of the libraries, on a device that has as little shared memory as any, or as much as told."""
    reason = build()
    if reason:
        pytest.skip(f"the CUDA kernels cannot be built for the CPU: {reason}")
    if name == "simt_fma" and platform.machine() == "x86_64" and "avx2" not in core.isas():
        pytest.skip("this processor does not fuse products and sums")
    least = SM75 if name == "simt_sm75" else SM86
    return Simt(next(BUILD.glob(f"**/lib{name}.so")), shared_bytes or least)
