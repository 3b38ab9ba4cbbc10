"""Runs `npad.check` in child processes: a kernel that fails may take its process with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from npad.ops.trust.findings import Finding, read_line

__all__ = ["SHORT_OF_MEMORY", "UncheckedError", "findings"]

COMMAND = ("-m", "npad.check")
LIMIT = 300  # seconds of one child; a driver that has to compile PTX first may take a minute
SHORT_OF_MEMORY = 75  # exit status of a child: it says nothing about the kernels
ROOT = Path(__file__).parents[3]  # that holds the package, which may have been found in another way


class UncheckedError(RuntimeError):
    """A check that could not be made, which says nothing about the kernels."""


def findings(device: str, *, full: bool) -> Iterator[Finding]:
    """What was found of each op.

    Parameters
    ----------
    device : "cpu", or the UUID of a GPU that this process sees
    full : with times

    Yields
    ------
    Finding; of an op at which a child has died or was not done in time, one with that fault.

    Raises
    ------
    UncheckedError
        A child could not be started, has ended before an op, or had too little memory.
    """
    if getattr(sys, "frozen", False) or not sys.executable:
        raise UncheckedError("this program has no Python interpreter that could be started")
    last, ended = "", ""
    while True:  # each child goes on behind the op at which the one before it ended
        words = [device, "full" if full else "quick", last]
        before = last
        out, ended = _run([sys.executable, *COMMAND, *words])
        begun = None
        for told in map(read_line, out.splitlines()):
            if isinstance(told, Finding):
                begun, last = None, told.op
                yield told
            elif told is not None:
                begun = last = told
        if begun is not None:
            yield Finding(begun, ended or "the process ended")
        elif not ended:
            return
        elif last == before:
            raise UncheckedError(ended)


def _run(command: list[str]) -> tuple[str, str]:
    """What a process has written, and how it ended if not well."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=LIMIT,
            cwd="/",  # before Python 3.11 it stands in front of PYTHONPATH
            env=_environment(),
            check=False,
        )
    except subprocess.TimeoutExpired as late:
        return _text(late.stdout), f"it was not done in {LIMIT} s"
    except OSError as error:
        raise UncheckedError(f"{sys.executable} could not be started: {error.strerror}") from error
    out, said = _text(done.stdout), _text(done.stderr).strip().splitlines() or ["nothing was said"]
    if done.returncode == SHORT_OF_MEMORY:
        raise UncheckedError(said[-1])
    if done.returncode < 0:
        number = -done.returncode
        return out, f"the process was killed by signal {number} ({signal.strsignal(number)})"
    return out, f"exit status {done.returncode}: {said[-1]}" if done.returncode else ""


def _text(written: bytes | None) -> str:
    return (written or b"").decode(errors="replace")


def _environment() -> dict[str, str]:
    """Of a child that imports what this process would, and does not check in its turn."""
    path = os.pathsep.join(str(Path(folder).absolute()) for folder in [*sys.path, str(ROOT)])
    own = {"PYTHONPATH": path, "PYTHONSAFEPATH": "1", "PYTHONWARNINGS": "ignore", "NPAD_CHECK": "0"}
    return os.environ | own
