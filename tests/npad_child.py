"""Runs npad in processes of its own that begin at once, to be sent signals and to be killed.

As a program it has imported all that npad needs, and forks a child for each line that it reads: JSON
with ``args``, ``out`` and ``kill_at``. It answers with the child's number, and with its exit status
once it has ended. `kill_at` has the child kill itself before so many lines of the modules that write
have run.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

WRITING = ("score_tables.py", "watching.py", "watch_state.py", "atomic_file.py")


class Child:
    """A run of npad.

    Attributes
    ----------
    pid : of its process
    """

    def __init__(self, server: subprocess.Popen[str], args: object, out: Path, kill_at: int | None):
        self._server, self._out = server, out
        job = {"args": [str(arg) for arg in args], "out": str(out), "kill_at": kill_at}
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        self.pid = self._told("pid")

    def wait(self) -> tuple[int, str]:
        """Its exit code, or minus the signal that ended it, and what it said on both streams."""
        return self._told("code"), self.said()

    def _told(self, what: str) -> int:
        """What the server says next, after what a child may have left that nobody waited for.

        A code that is taken for a process would have a test send its signals to this process group.
        """
        while True:
            kind, number = self._server.stdout.readline().split()
            if kind == what:
                return int(number)

    def said(self) -> str:
        return self._out.read_text()


@contextmanager
def server() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    ) as process:  # fmt: skip
        yield process
        process.stdin.close()


def _serve() -> None:
    import numpy as np
    import torch

    import npad.cli.watching  # noqa: F401
    from npad import NPad

    torch.set_num_threads(1)  # no thread outlives a fork
    image = np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3)
    NPad("filterbank", image_size=32).embed([image])  # imports the rest
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if not pid:
            _run(job)
        print("pid", pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print("code", os.waitstatus_to_exitcode(status), flush=True)


def _run(job: dict[str, object]) -> None:
    out = os.open(job["out"], os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(out, stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from npad.cli import commands, program, watching

    watching.SAVED_EVERY = 0.05
    n_lines = 0

    def on_line(*_: object) -> object:
        nonlocal n_lines
        n_lines += 1
        if n_lines == job["kill_at"]:
            os.kill(os.getpid(), signal.SIGKILL)
        return on_line

    def on_call(frame: object, *_: object) -> object:
        return on_line if frame.f_code.co_filename.endswith(WRITING) else None

    sys.settrace(on_call)
    code: object = 1
    with suppress(BaseException):
        try:
            program.run(commands.app, job["args"])
        except SystemExit as end:
            code = end.code
    sys.settrace(None)
    print(f"{n_lines} lines", flush=True)
    os._exit(code)


if __name__ == "__main__":
    _serve()
