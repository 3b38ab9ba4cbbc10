"""The child process: `python -m npad.check DEVICE quick|full AFTER` tells a line of JSON for each op.

DEVICE is "cpu" or the UUID of a GPU. AFTER is the op behind which to go on, or empty. It ends at an op
that raises, since nothing may run after that; `npad.ops.trust.children` then starts another.
"""

from __future__ import annotations

import sys

import torch

from npad import devices
from npad.check import Clock, examine
from npad.check.cases import CASES
from npad.ops.trust.children import SHORT_OF_MEMORY
from npad.ops.trust.findings import Finding, line_of


def main(device_name: str, extent: str, after: str) -> int:
    """Check the ops of a device; returns the exit status."""
    names = list(CASES)
    device = _device(device_name)
    clock = Clock(device) if extent == "full" else None
    for name in names[names.index(after) + 1 if after else 0 :]:
        print(line_of(name), flush=True)
        try:
            found = examine(name, device, clock)
        except RuntimeError as error:
            text = str(error).strip().splitlines()[0]
            if devices.is_shortage(error):
                print(text, file=sys.stderr)
                return SHORT_OF_MEMORY
            print(line_of(Finding(name, text)), flush=True)
            return 1
        print(line_of(found), flush=True)
    return 0


def _device(name: str) -> torch.device:
    if name == "cpu":
        return torch.device("cpu")
    for i in range(torch.cuda.device_count()):
        if str(torch.cuda.get_device_properties(i).uuid) == name:
            torch.cuda.set_device(i)
            # Where another process has the GPU to itself, nothing runs.
            torch.zeros(1, device="cuda").cpu()
            return torch.device("cuda", i)
    sys.exit(f"a child process does not see the GPU {name}")


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
