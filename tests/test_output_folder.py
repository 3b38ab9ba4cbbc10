"""One run at a time writes into a folder."""

from __future__ import annotations

import errno
import fcntl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import SMALL, fail, succeed
from image_files import make_category

from npad.cli.output_folder import LOCK, alone_in
from npad.cli.program import UsageError

HOLD = """
import sys, time
from pathlib import Path
from npad.cli.output_folder import alone_in
with alone_in(Path(sys.argv[1])):
    print("ready", flush=True)
    time.sleep(100)
"""


@pytest.fixture
def busy(tmp_path: Path) -> Iterator[tuple[Path, subprocess.Popen[str]]]:
    """A folder, and a process that writes into it."""
    folder = tmp_path / "out"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, folder], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield folder, process
        process.kill()


def test_the_second_run_is_refused_before_the_work(
    busy: tuple[Path, subprocess.Popen[str]], tmp_path: Path
) -> None:
    folder, process = busy
    category = make_category(tmp_path / "part", size=(32, 32))
    model = tmp_path / "m"
    succeed("fit", category / "train/good", "-o", model, *SMALL)
    predict = ("predict", model, category / "test", "-o", folder)
    for command in (
        predict,
        ("evaluate", category, "-o", folder, *SMALL),
        ("demo", "-o", folder, *SMALL),
    ):
        fail(2, *command, says=[f"{folder}: another run is writing there", "--output"])
        assert {path.name for path in folder.iterdir()} == {LOCK}
    succeed("fit", category / "train/good", "-o", folder / "m", *SMALL)  # is replaced at once

    process.kill()
    process.wait()
    assert (folder / LOCK).exists()
    succeed(*predict)
    assert not (folder / LOCK).exists()


def test_in_one_process(tmp_path: Path) -> None:
    with alone_in(tmp_path / "a"), alone_in(tmp_path / "b"):
        with pytest.raises(UsageError, match="another run is writing"), alone_in(tmp_path / "a"):
            pass
        assert (tmp_path / "a" / LOCK).exists()
    for name in ("a", "b"):
        with alone_in(tmp_path / name):
            pass
        assert list((tmp_path / name).iterdir()) == []


def test_where_there_are_no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with alone_in(tmp_path), alone_in(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_the_last_owner_goes_while_the_file_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is locked then is a file that nobody finds any more."""
    lock, calls = fcntl.flock, []

    def interfere(descriptor: int, how: int) -> None:
        calls.append(descriptor)
        if len(calls) < 3:
            (tmp_path / LOCK).unlink()
        if len(calls) == 2:
            (tmp_path / LOCK).touch()
        lock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", interfere)
    with alone_in(tmp_path):
        monkeypatch.undo()
        assert len(calls) == 3
        with pytest.raises(UsageError), alone_in(tmp_path):
            pass


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"), alone_in(tmp_path / "file"):
        pass
