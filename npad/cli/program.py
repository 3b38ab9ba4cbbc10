"""What every command shares: the options of NPad, one-line errors, exit codes, Ctrl-C.

Nothing heavy is imported before a command runs, so that `--help` is quick.
"""

from __future__ import annotations

import ast
import inspect
import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer

__all__ = ["Arguments", "UsageError", "check_device", "command", "new_model", "run"]

FAILED, USAGE, INTERRUPTED, PIPE_CLOSED = 1, 2, 130, 141
REPORTED = (ValueError, OSError, RuntimeError, MemoryError, ImportError)  # told as they are

Arguments = dict[str, Any]  # of NPad, those given


class UsageError(Exception):
    """The command line asks for something that cannot be."""


def _layers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _image_size(text: str) -> int | tuple[int, int]:
    sides = [int(side) for side in text.lower().split("x")]
    if len(sides) > 2:
        raise ValueError(text)
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])


def _number(text: str) -> float:
    return int(text) if re.fullmatch(r"[+-]?\d+", text) else float(text)


def _eps(text: str) -> float | str:
    return text if text == "auto" else float(text)


def _switch(text: str) -> bool:
    return {"on": True, "off": False}[text]


def _weights(text: str) -> Path:
    if not Path(text).is_file():
        raise typer.BadParameter(f"there is no file {text!r}")
    return Path(text)


# Argument of NPad: type or parser, what stands for the value, help. NPad checks the values.
OPTIONS: dict[str, tuple[Callable[[str], Any], str, str]] = {
    "backbone": (str, "NAME", 'A timm model, or "filterbank", which needs no download.'),
    "layers": (_layers, "I,J", "Feature levels, as timm counts them. [default: strides 8 and 16]"),
    "image_size": (_image_size, "N|HxW", "Pixels to which images are resized, height x width."),
    "weights": (_weights, "FILE", "The backbone's weights. [default: timm downloads them]"),
    "window": (int, "ODD", "Side of the training window, in positions of the grid."),
    "score_window": (int, "ODD", "Side of the evaluation window, in positions of the grid."),
    "eps": (_eps, "auto|X", "Added to every variance, in squared units of the features."),
    "nominal_set": (str, "kcenter|kmeans|none", "How the centroids are chosen."),
    "n_centroids": (_number, "N", "Number of centroids; below 1, a fraction of the embeddings."),
    "fusion": (
        str,
        "product|sum|mahalanobis|euclidean",
        "How both distances become one map. [default: product; mahalanobis without centroids]",
    ),
    "fusion_weight": (
        float,
        "X",
        "Share of the Mahalanobis distance in product and sum, 0 to 1.",
    ),
    "factor_dtype": (str, "float32|float16|bfloat16", "Storage of the Gaussians."),
    "n_features": (int, "N", "Dimensions to which embeddings are reduced. [default: all]"),
    "reduction": (str, "pca|random", "How embeddings are reduced, with --n-features."),
    "holdout": (float, "X", "Fraction of the images on which eps is chosen, 0 to 0.5."),
    "seed": (int, "N", "Seed of every random choice."),
    "device": (str, "DEVICE", "Torch device, such as cpu, cuda:0 or auto."),
    "backbone_dtype": (
        str,
        "float32|float16|bfloat16",
        "In which the backbone computes. [default: float32; float16 to score on a GPU]",
    ),
    "compile": (_switch, "on|off", "Run the backbone through torch.compile."),
    "batch_size": (int, "N", "Images that go through the backbone together."),
}


def _defaults() -> Arguments:
    """Defaults of NPad, read from its source: importing it takes seconds."""
    tree = ast.parse((Path(__file__).parents[1] / "detector.py").read_text(encoding="utf-8"))
    functions = (
        part
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name == "NPad"
        for part in node.body
        if isinstance(part, ast.FunctionDef) and part.name == "__init__"
    )
    found = next(functions).args
    names = [arg.arg for arg in (*found.args[-len(found.defaults) :], *found.kwonlyargs)]
    values = [node for node in (*found.defaults, *found.kw_defaults) if node is not None]
    return {name: ast.literal_eval(value) for name, value in zip(names, values, strict=True)}


def _options(overrides: Arguments) -> list[inspect.Parameter]:
    """NPad's arguments as options that are None where they are not given."""
    defaults = _defaults() | overrides
    parameters = []
    for name, (parse, metavar, text) in OPTIONS.items():
        value = defaults[name]
        if isinstance(value, bool):
            value = "on" if value else "off"
        default = "" if value is None else f" [default: {value}]"
        option = typer.Option(
            "--" + name.replace("_", "-"),
            parser=_parsed(parse),
            metavar=metavar,
            help=text + default,
            show_default=False,  # typer's own would be None: not given
        )
        parameters.append(
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[Any, option],
            )
        )
    return parameters


def _parsed(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    def value(text: str) -> Any:
        try:
            return parse(text)
        except (ValueError, KeyError) as error:
            raise typer.BadParameter(f"{text!r} cannot be understood") from error

    return value


def new_model(arguments: Arguments, **more: Any) -> Any:
    """Make an NPad from the options that were given. What it refuses is an error of usage."""
    from npad.detector import NPad  # noqa: PLC0415

    arguments = arguments | more
    if arguments.get("nominal_set") == "none":
        arguments["nominal_set"] = None
    try:
        return NPad(**arguments)
    except (ValueError, RuntimeError) as error:
        raise UsageError(str(error)) from error


def check_device(name: str) -> None:
    """Say before the work that a device is not there."""
    from npad import devices  # noqa: PLC0415

    try:
        devices.resolve(name)
    except ValueError as error:
        raise UsageError(str(error)) from error


def command(
    app: typer.Typer, *modules: str, **overrides: Any
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add a function to the application.

    A parameter ``arguments: Arguments`` of the function stands for the options of NPad: it gets
    those that were given, and ``overrides`` of NPad's defaults. ``--debug`` is added to all.
    ``modules`` are imported before the function is called.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(function, eval_str=True)
        takes_model = "arguments" in signature.parameters
        own = [
            p.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for p in signature.parameters.values()
            if p.name != "arguments"
        ]
        debug = inspect.Parameter(
            "debug",
            inspect.Parameter.KEYWORD_ONLY,
            default=False,
            annotation=Annotated[bool, typer.Option("--debug", help="Show the traceback.")],
        )

        def job(**given: Any) -> None:
            show_traceback = given.pop("debug")
            if takes_model:
                chosen = {name: given.pop(name) for name in OPTIONS}
                chosen = {name: value for name, value in chosen.items() if value is not None}
                given["arguments"] = overrides | chosen
            _run_job(function, given, modules, show_traceback)

        parameters = [*own, *(_options(overrides) if takes_model else []), debug]
        job.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        job.__annotations__ = {p.name: p.annotation for p in parameters}
        job.__name__, job.__doc__ = function.__name__, function.__doc__
        app.command(function.__name__)(job)
        return function

    return decorate


def _run_job(
    function: Callable[..., None], given: dict[str, Any], modules: Sequence[str], debug: bool
) -> None:
    try:
        for module in modules:
            import_module(module)
        _interrupt.working = True
        function(**given)
        sys.stdout.flush()  # here, where a full disk or a closed pipe can still be told
    except BrokenPipeError as error:  # typer would exit with 1
        raise typer.Exit(_pipe_closed()) from error
    except Exception as error:
        if _interrupt.seen:  # an import or a library turned it into something else
            raise KeyboardInterrupt from error
        if debug:
            traceback.print_exc()
        _tell("error", f"{_message(error)}")
        raise typer.Exit(USAGE if isinstance(error, UsageError) else FAILED) from error


def _message(error: Exception) -> str:
    """What happened and what to do, on one line, in the words of the command line."""
    if isinstance(error, OSError) and error.strerror:
        named = f"{error.filename}: " if error.filename is not None else ""
        text = (
            f"{named}{error.strerror.lower()}; check the path, its permissions and the space "
            "on its disk"
        )
    elif isinstance(error, (UsageError, *REPORTED)):
        text = str(error) or type(error).__name__
    else:
        text = f"internal error: {type(error).__name__}: {error}; please report it with --debug"
    text = re.sub(r"^NPad(\.\w+)?: ", "", " ".join(text.split()))
    arguments = "|".join([*OPTIONS, "skip_bad"])
    return re.sub(
        rf"\b({arguments})=(True\b)?", lambda m: f"--{m[1].replace('_', '-')} ", text
    ).replace("  ", " ")


def _tell(kind: str, text: str) -> None:
    print(f"npad: {kind}: {text}", file=sys.stderr)


class _Interrupt:
    """Ctrl-C. While libraries are imported nothing is at stake, and some crash if interrupted."""

    seen = False
    working = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.seen = True
        if not self.working:
            os.write(2, b"npad: interrupted\n")
            os._exit(INTERRUPTED)
        raise KeyboardInterrupt


_interrupt = _Interrupt()


def run(app: typer.Typer, args: Sequence[str] | None = None) -> NoReturn:
    """Run the program and exit: 0, 1 (failed), 2 (usage), 130 (Ctrl-C) or 141 (closed pipe)."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is ignored
        signal.signal(signal.SIGINT, _interrupt)
    warnings.showwarning = lambda message, *_, **__: _tell(
        "warning", " ".join(str(message).split())
    )
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        code = _run(app, sys.argv[1:] if args is None else args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BrokenPipeError:
        code = _pipe_closed()
    if code == INTERRUPTED or _interrupt.seen:
        code = INTERRUPTED
        print("npad: interrupted", file=sys.stderr)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the outcome stands
    sys.exit(code)


def _pipe_closed() -> int:
    """Keep quiet about a reader that has gone, in the flush at exit too."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return PIPE_CLOSED


def _run(app: typer.Typer, args: Sequence[str]) -> int:
    program = typer.main.get_command(app)
    try:
        code = program.main(list(args) or ["--help"], prog_name="npad", standalone_mode=False)
    except typer.Abort:
        return INTERRUPTED
    except Exception as error:
        if not hasattr(error, "format_message"):  # the class of errors of usage has moved once
            raise
        path = getattr(getattr(error, "ctx", None), "command_path", "npad")
        _tell("error", f"{' '.join(error.format_message().split())} (see {path} --help)")
        return USAGE
    return code or 0
