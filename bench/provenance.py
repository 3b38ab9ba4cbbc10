"""What a kept result names, so that its figures can be read and measured again."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).parents[1]


def provenance(checkout: Path = CHECKOUT) -> dict[str, Any]:
    """Commit, processor, load, and what npad runs on; `npad.info` has threads and versions.

    Parameters
    ----------
    checkout : from which npad is imported
    """
    from npad import info  # it brings PyTorch, which the parents of measuring processes do without

    return {
        **commit(checkout),
        "processor": processor(),
        "load_average": os.getloadavg()[0],
        **info(),
    }


def commit(checkout: Path = CHECKOUT) -> dict[str, Any]:
    """Commit of a checkout, and whether tracked files differ from it; None where git cannot say.

    NPAD_COMMIT names it where there is no git to ask, as ``git describe --dirty`` would.
    """
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40"]
    command += ["--exclude=*"]  # tags
    described = os.environ.get("NPAD_COMMIT")
    try:
        described = described or subprocess.check_output(
            command, stderr=subprocess.DEVNULL, text=True
        )
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}
    name = described.strip()
    return {"commit": name.removesuffix("-dirty"), "dirty": name.endswith("-dirty")}


def processor() -> str:
    """Name of the processor, as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
