"""The package where its source is not installed, or runs without docstrings."""

from __future__ import annotations

import compileall
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import SMALL, fail
from image_files import make_category

import npad
from npad.cli import program


@pytest.fixture(scope="module", params=[0, 2], ids=["plain", "without docstrings"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That holds the byte code of npad alone, and what is no Python."""
    folder = tmp_path_factory.mktemp("byte code")
    package = shutil.copytree(
        Path(npad.__file__).parent, folder / "npad", ignore=shutil.ignore_patterns("__pycache__")
    )
    compileall.compile_dir(package, quiet=1, legacy=True, optimize=request.param)
    for source in package.rglob("*.py"):
        source.unlink()
    return folder


RUN = """
import json, sys
from npad import detector
from npad.cli import commands, program

assert detector.__file__ == sys.argv[1], detector.__file__
for args in json.loads(sys.argv[2]):
    try:
        program.run(commands.app, args)
    except SystemExit as end:
        assert end.code == 0, args
"""


def run(folder: Path, *args: object) -> None:
    done = subprocess.run(
        [sys.executable, *map(str, args)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), *sys.path])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_every_command(folder: Path, tmp_path: Path) -> None:
    category = make_category(tmp_path / "part", size=(32, 32))
    model, report = tmp_path / "m", tmp_path / "report"
    commands = [
        ["fit", "--help"],
        ["info"],
        ["fit", category / "train/good", "-o", model, *SMALL],
        ["predict", model, category / "test", "-o", tmp_path / "out"],
        ["evaluate", category, "-o", report, *SMALL],
    ]
    run(folder, "-m", "npad", "--help")
    run(folder, "-m", "npad.check", "cpu", "quick", "anomaly_map")  # the child of `npad check`
    run(folder, "-c", RUN, folder / "npad/detector.pyc", json.dumps(commands, default=str))
    assert (report / "report.html").is_file()


def test_pytorch_without_its_source(monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads it while it is imported, and says no more than this."""

    def refuse(name: str) -> None:
        raise OSError("could not get source code")

    monkeypatch.setattr(program, "import_module", refuse)
    fail(1, "info", says=["install torch with its .py files"])
