"""Run `npad` in this process, and check what it says when it fails."""

import io
import resource
import signal
import sys
import warnings
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import NamedTuple
from unittest import mock

import pytest

from npad.cli import commands, program

SMALL = ("--backbone", "filterbank", "--image-size", "64", "--n-centroids", "50", "--threads", "1")


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


def npad(*args):
    """The whole program but for its process: signals and warnings of this one stay as they are."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    with (
        redirect_stdout(out),
        redirect_stderr(err),
        mock.patch.object(signal, "signal"),
        mock.patch.object(warnings, "showwarning"),
        mock.patch.object(sys, "unraisablehook"),
        pytest.raises(SystemExit) as end,
    ):
        program.run(commands.app, [str(arg) for arg in args])
    texts = []
    for stream in (out, err):
        stream.flush()
        texts.append(stream.buffer.getvalue().decode())
    return Outcome(end.value.code, *texts)


def succeed(*args):
    outcome = npad(*args)
    assert outcome.code == 0, outcome.err
    return outcome


def fail(code, *args, says=()):
    """Run and check the exit code and that the error is one line that holds all of `says`."""
    outcome = npad(*args)
    assert outcome.code == code, outcome
    assert outcome.err.startswith("npad: error: "), outcome.err
    assert outcome.err.count("\n") == 1, outcome.err
    missing = [text for text in says if str(text) not in outcome.err]
    assert not missing, f"{missing} missing in {outcome.err!r}"
    return outcome


@contextmanager
def disk_of(n_bytes):
    """Let no file grow beyond this, as if the disk were full."""
    _, hard = before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
