"""README, CONTRIBUTING and docs/: every code block runs, and what the prose names is there.

The blocks of a page run in order and in one folder, as a reader would run them; those in Python share
their names. They are made small by the tables below and by nothing else. A block in a language or with
a command that is not known here fails.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import importlib.util
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import command_line
import numpy as np
import pytest
import timm
import torch
from image_files import save_image
from markdown_it import MarkdownIt
from parts import part, random_pose
from safetensors.torch import save_file

from npad.evaluation.synthetic import make_dataset
from npad.learned import Learned, LearnedMember
from npad.nominal_methods import METHODS
from npad.settings import ARGUMENTS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

# What a block says, and what runs in its place: no download, few pixels, few images.
PYTHON_INSTEAD = {
    # A model of another size, and tiles in proportion.
    'backbone="wide_resnet50_2", image_size=4096, tile=1024, n_features=32': 'backbone="filterbank", '
    "image_size=64, tile=48, overlap=16, n_features=8, n_centroids=50",
    'backbone="wide_resnet50_2", image_size=(500, 20000), tile=(500, 1024), n_features=32': "backbone="
    '"filterbank", image_size=(48, 256), tile=(48, 96), overlap=32, n_features=8, n_centroids=50',
    'backbone="wide_resnet50_2"': 'backbone="filterbank", image_size=64, n_centroids=50, '
    "false_alarm_rate=0.3",
    'make_dataset("cloth")': 'make_dataset("cloth", image_size=(64, 64), n_train=6)',
    "false_alarm_rate=0.01, confidence": "false_alarm_rate=0.7, confidence",
    "false_alarm_rate=0.01": "false_alarm_rate=0.3",
}
# What stands before and after the options that a command has; the last of an option counts.
BEFORE = {
    "fit": ("--backbone", "filterbank"),
    "evaluate": ("--backbone", "filterbank"),
    "plan": ("--backbone", "filterbank"),
}
MODEL = ("--image-size", "64", "--n-centroids", "50", "--threads", "1")
THREADS = ("--threads", "1")
AFTER = {
    **dict.fromkeys(("fit", "evaluate", "demo", "plan"), MODEL),
    "calibrate": (*THREADS, "--false-alarm-rate", "0.3"),
    "predict": THREADS,
}
TILE = ("--tile", "48", "--overlap", "16", "--n-features", "8")  # of a model of that size
WATCH = ("--every", "0.1", "--until-idle", "0.5")  # it would not end
WOVEN = "npad-demo/data-seed0/woven"  # what `npad demo` would weave, large, were it not there


class Block(NamedTuple):
    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    for token in MarkdownIt().parse(page.read_text(encoding="utf-8")):
        if token.type in ("fence", "code_block"):  # the latter is indented, and has no language
            assert token.map is not None
            yield Block(page, token.map[0] + 1, token.info.strip(), token.content)


@pytest.fixture(scope="module")
def resources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data and weights that the pages name: woven cloth, or a few real tiles, and noise."""
    root = tmp_path_factory.mktemp("resources")
    size = {"image_size": (64, 64), "n_train": 6, "n_test_good": 4, "n_defective": 5}
    names = ("bottle", "mvtec/bottle", "mvtec/cable", "mtd", WOVEN, "line1", "line2")
    for seed, name in enumerate(names):
        make_dataset(root / name, seed, **size)
    if "NPAD_DATA" in os.environ:
        few_of(Path(os.environ["NPAD_DATA"]) / "mtd", root / "tiles")
    else:
        make_dataset(root / "tiles", **size)
    shutil.copytree(root / "bottle/test", root / "camera")
    rng = np.random.default_rng(0)
    for i in range(10):
        pixels = part((64, 64), random_pose(rng, "euclidean", 0.05, 5), seed=i)
        save_image(root / f"plates/{'train' if i < 7 else 'camera'}/{i}.png", pixels)
    for seed, folder in enumerate(("bottle/more-good", "left", "right"), start=9):
        make_dataset(root / f"woven{seed}", seed, **size)
        shutil.copytree(root / f"woven{seed}/test/good", root / folder)
    shutil.copy(root / "bottle/test/good/000.png", root / "one-more.png")
    network = timm.create_model("resnet18", features_only=True, out_indices=(1, 2, 3))
    for name in ("resnet18.safetensors", "resnet18_layers123.safetensors"):
        save_file(network.state_dict(), root / name)
    return root


def few_of(source: Path, target: Path) -> None:
    """Six images of each type of a data set, with their masks."""
    for folder in (source / "train/good", *(source / "test").iterdir()):
        for image in sorted(folder.iterdir())[:6]:
            mask = source / "ground_truth" / folder.name / f"{image.stem}_mask.png"
            for file in (image, *([mask] if mask.exists() else [])):
                copy = target / file.relative_to(source)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copy)


@pytest.fixture
def folder(resources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the blocks of one page run."""
    shutil.copytree(resources, tmp_path, dirs_exist_ok=True, copy_function=shutil.copyfile)
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_blocks(page: Path, folder: Path) -> None:
    names: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page):
        match block.language:
            case "python":
                run_python(block, names)
            case "sh":
                for command in commands(block):
                    run_command(block, command)
            case "text":  # a formula, a picture, a folder: nothing to run
                pass
            case other:
                pytest.fail(
                    f"{block}: the language of a block is python, sh or text, not {other!r}"
                )


def run_python(block: Block, names: dict[str, object]) -> None:
    text = block.text
    for said, instead in PYTHON_INSTEAD.items():
        text = text.replace(said, instead)
    code = compile("\n" * block.line + text, str(block.page), "exec")
    with contextlib.redirect_stdout(io.StringIO()):
        exec(code, names)


def commands(block: Block) -> Iterator[list[str]]:
    """The words of each command, without what sets the environment."""
    for line in block.text.splitlines():
        words: list[str] = []
        for word in [*shlex.split(line, comments=True), "&&"]:
            if word != "&&":
                words.append(word)
            elif words:
                while re.match(r"[A-Z_]+=", words[0]):
                    words = words[1:]
                yield words
                words = []


def run_command(block: Block, words: list[str]) -> None:
    """Run a command of npad in this process; of others, check what they name."""
    name, *args = words
    if name.endswith("npad") and args[0] != "fetch":
        command, *options = args
        after = *AFTER.get(command, ()), *(WATCH if "--watch" in options else ())
        after = *after, *(TILE if "--tile" in options else ())
        done = command_line.npad(command, *BEFORE.get(command, ()), *options, *after)
        assert done.code == 0, f"{block}: {' '.join(words)}: {done.err}"
        return
    check = fetched if name.endswith("npad") else CHECKED.get(name.removeprefix(".venv/bin/"))
    assert check is not None, f"{block}: {name!r} is not known to this test"
    wrong = check(args)
    assert not wrong, f"{block}: {' '.join(words)}: {wrong}"


# --- commands that are not run: each returns what is wrong ---


def absent(args: list[str]) -> list[str]:
    """Arguments that should be files of the project."""
    files = [arg for arg in args if not arg.startswith("-") and ("/" in arg or arg[-3:] == ".py")]
    return [file for file in files if not list(ROOT.glob(file.partition("{")[0]))]


def fetched(args: list[str]) -> list[str]:
    """What `npad fetch` would download is there already."""
    match args:
        case ["fetch", model, "-o", file]:
            return [] if timm.is_model(model) and Path(file).is_file() else [model, file]
    return args


def pip(args: list[str]) -> list[str]:
    extras = PROJECT["project"]["optional-dependencies"]
    requirements = PROJECT["build-system"]["requires"]
    wrong = []
    for arg in args[args[0] == "install" :]:
        named = re.fullmatch(r"(?:\.|npad)(?:\[(.+)\])?", arg)
        if named:
            wrong += [e for e in (named[1] or "").split(",") if e and e not in extras]
        elif not arg.startswith("-") and arg not in requirements:
            wrong.append(arg)
    return wrong


def python(args: list[str]) -> list[str]:
    match args:
        case ["-m", "venv", ".venv"]:
            return []
        case [script, *options] if script.startswith("bench/"):
            text = (ROOT / script).read_text() if (ROOT / script).exists() else ""
            return [o for o in options if o.startswith("--") and f'"{o}"' not in text] or absent(
                [script]
            )
    return args


def in_ci(tool: str) -> Callable[[list[str]], list[str]]:
    """A tool of which CI runs the same."""
    script = (ROOT / ".ci/run").read_text()

    def check(args: list[str]) -> list[str]:
        same = tool if not args or args[0].startswith("-") else f"{tool} {args[0]}"
        return absent(args) or ([] if same in script else [f"{same} is not in .ci/run"])

    return check


def script(path: str) -> Callable[[list[str]], list[str]]:
    return lambda _: [] if (ROOT / path).stat().st_mode & 0o100 else [path]


CHECKED: dict[str, Callable[[list[str]], list[str]]] = {
    "pip": pip,
    "python": python,
    "python3": python,
    "pytest": absent,
    "pre-commit": lambda _: [] if (ROOT / ".pre-commit-config.yaml").exists() else ["no hooks"],
    **{tool: in_ci(tool) for tool in ("ruff", "mypy", "clang-format", "mkdocs", "lint-imports")},
    "import-linter": lambda args: [] if args == ["drawgraph", "npad"] else args,
    **{path: script(path) for path in (".ci/run", ".ci/sanitize", ".ci/docstrings", ".ci/wheel")},
    "bench/gpu_check.sh": script("bench/gpu_check.sh"),
}


# --- what the prose says ---

# Paths in backquotes. <op> and * stand for any name.
NAMED = re.compile(r"`((?:npad|csrc|tests|bench|docs|cmake|\.ci|\.github)/[\w./<>*-]*)`")
DOTTED = re.compile(r"`(npad(?:\.\w+)+)(?:\(\))?`")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    patterns = (re.sub(r"<\w+>", "*", path) for path in NAMED.findall(text))
    assert not [pattern for pattern in patterns if not list(ROOT.glob(pattern))]
    assert not [name for name in DOTTED.findall(text) if not is_importable(name)]


def is_importable(name: str) -> bool:
    """Whether a dotted name is a module, or an attribute of one or of its class."""
    parts = name.split(".")
    for n in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:n]))
        except ImportError:
            continue
        try:
            for part in parts[n:]:
                found = getattr(found, part)
        except AttributeError:
            return False
        return True
    return False


def test_defaults_in_the_readme_are_those_of_the_settings() -> None:
    rows = re.findall(
        r"^\| `(\w+)` \| `([^`]+)` \|", (ROOT / "README.md").read_text(), re.MULTILINE
    )
    assert len(rows) >= 10
    defaults = {argument.name: argument.default for argument in ARGUMENTS}
    assert {name: ast.literal_eval(text) for name, text in rows} == {
        name: defaults.get(name, "no argument") for name, _ in rows
    }


@pytest.fixture(scope="module")
def tables() -> Any:
    """The hook of the site; it needs nothing of MkDocs."""
    spec = importlib.util.spec_from_file_location("tables", ROOT / "docs/tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_hold_every_argument_method_and_learned_value(tables: Any) -> None:
    page = tables.on_page_markdown((ROOT / "docs/arguments.md").read_text())
    rows = re.findall(r"^\| `'?(\w+)'?` \|", page, re.MULTILINE)
    assert rows == [*(argument.name for argument in ARGUMENTS), *METHODS]
    page = tables.on_page_markdown((ROOT / "docs/model-file.md").read_text())
    rows = re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)
    kept = [argument.name for argument in ARGUMENTS if argument.kept]
    learned = [field.name for cls in (Learned, LearnedMember) for field in dataclasses.fields(cls)]
    assert rows[: len(kept)] == kept
    assert sorted(rows[len(kept) :]) == sorted(learned)


def test_the_rooms_are_those_that_import_linter_holds() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    drawn = text.partition("## Rooms")[2].partition("```text\n")[2].partition("```")[0]
    layers = PROJECT["tool"]["importlinter"]["contracts"][0]["layers"]
    assert drawn.splitlines() == layers


def test_every_mark_of_a_table_is_known(tables: Any) -> None:
    used = [
        mark for page in PAGES for mark in re.findall(r"<!-- table: (.+) -->", page.read_text())
    ]
    assert sorted(used) == sorted(tables.TABLES)


# --- the form of docstrings ---

RIGHT = '''
def f():
    """Do it.

    Raises
    ------
    ValueError
        An even window.
    npad.ModelFileError
        The file is damaged.

    Notes
    -----
    Any : thing.
    """
'''


@pytest.mark.parametrize(
    "entry",
    [
        "ValueError : An even window.",
        "ValueError  An even window.",
        "ValueError",
        "ValueError, TypeError\n        An even window.",
    ],
)
def test_docstrings_that_say_it_another_way_are_refused(entry: str, tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    check = [sys.executable, ROOT / ".ci/docstrings", file]
    file.write_text(RIGHT)
    assert run(check) == (0, "")
    file.write_text(RIGHT.replace("ValueError\n        An even window.", entry))
    code, said = run(check)
    assert code == 1
    assert f"{file}:7: {entry.splitlines()[0]!r}" in said


def run(command: list[object]) -> tuple[int, str]:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr
