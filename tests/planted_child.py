"""The child of a check, on the CPU emulator, with a fault planted in the kernel of one op.

python planted_child.py OP FAULT DEVICE EXTENT AFTER
"""

from __future__ import annotations

import os
import signal
import sys
import time
from functools import partial
from typing import Any

from simt_device import BUILD, SM86, Simt
from simt_wrappers import use
from torch import Tensor

from npad import check
from npad.check.__main__ import main
from npad.check.cases import CASES

planted, fault, _, extent, after = sys.argv[1:]


def plant(op: str, arguments: tuple[Any, ...]) -> None:
    """What the kernel of that op does wrong."""
    if op != planted:
        return
    if fault == "wrong":
        output = [a for a in arguments if isinstance(a, Tensor) and a.is_floating_point()][-1]
        output.view(-1)[-1] *= 1.01
    elif fault == "access":
        raise RuntimeError(f"npad.{op}: cudaErrorIllegalAddress: an illegal memory access")
    elif fault == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif fault == "hang":
        time.sleep(1000)
    elif fault == "memory":
        raise RuntimeError("CUDA error: out of memory")


check.SIZES, check.FEW_SIZES = (7,), ()  # type: ignore[assignment]
for name, case in CASES.items():
    CASES[name] = case._replace(large=partial(case.make, 20))  # for the emulator
use(Simt(next(BUILD.glob("**/libsimt_fast.so")), SM86), then=plant)
if fault == "no GPU":
    sys.exit("a child process does not see the GPU")
sys.exit(main("cpu", extent, after))
