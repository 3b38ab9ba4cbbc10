"""What every command shares: the options of NPad, one-line errors, exit codes, Ctrl-C.

Nothing heavy is imported before a command runs, so that `--help` is quick.
"""

from __future__ import annotations

import inspect
import os
import re
import signal
import sys
import threading
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer

from npad.file_names import shown
from npad.nominal_methods import METHODS
from npad.settings import ARGUMENTS, Argument, Settings

__all__ = [
    "Arguments",
    "UsageError",
    "check_device",
    "command",
    "model_option",
    "new_model",
    "parsed",
    "run",
    "tell",
    "with_options",
]

FAILED, USAGE, INTERRUPTED, PIPE_CLOSED = 1, 2, 130, 141
REPORTED = (ValueError, OSError, RuntimeError, MemoryError, ImportError)  # told as they are

Arguments = dict[str, Any]  # of NPad, those given


class UsageError(Exception):
    """The command line asks for something that cannot be."""


OPTIONS = tuple(argument for argument in ARGUMENTS if argument.parse is not None)


def _options(defaults: Mapping[str, str]) -> list[inspect.Parameter]:
    """NPad's arguments as options that are None where they are not given."""
    parameters = []
    for argument in OPTIONS:
        default = defaults.get(argument.name, argument.default_text)
        option = _option(argument, _parsed(argument), default)
        parameters.append(
            inspect.Parameter(
                argument.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[Any, option],
            )
        )
    return parameters


def _option(argument: Argument, parser: Callable[[str], Any], default: str) -> Any:
    return typer.Option(
        _option_name(argument.name),
        parser=parser,
        metavar=argument.values,
        help=f"{argument.help} [default: {default}]",
        show_default=False,  # typer's own would be None: not given
    )


def model_option(name: str) -> Any:
    """The option of an argument that a fitted model heeds; None where it is not given."""
    argument, parse = _named(name), parsed(name)

    def value(text: str) -> Any:
        given = parse(text)
        try:
            Settings(**{name: given})
        except ValueError as error:
            raise typer.BadParameter(with_options(str(error))) from error
        return given

    return _option(argument, value, "the model's" if argument.kept else argument.default_text)


def parsed(name: str) -> Callable[[str], Any]:
    """How the words of an argument's option are read."""
    parse = _parsed(_named(name))
    return lambda text: parse(text).value


def _named(name: str) -> Argument:
    (argument,) = (argument for argument in OPTIONS if argument.name == name)
    return argument


def _parsed(argument: Argument) -> Callable[[str], Any]:
    def value(text: str) -> Any:
        assert argument.parse is not None
        try:
            return _Given(argument.parse(text))
        except (ValueError, KeyError) as error:
            raise typer.BadParameter(f"{text!r} cannot be understood") from error
        except (FileNotFoundError, LookupError) as error:
            raise typer.BadParameter(str(error)) from error

    return value


@dataclass(frozen=True)
class _Given:
    """The value of an option that was given; None is one of the values of some."""

    value: Any


def new_model(arguments: Arguments, **more: Any) -> Any:
    """Make an NPad from the options that were given. What it would refuse is an error of usage."""
    from npad.detector import NPad  # noqa: PLC0415
    from npad.images.alignment import load_opencv  # noqa: PLC0415

    try:
        model = NPad(**arguments, **more)
        check_device(model.device)
        settings = model.settings()  # of which two may need a package that is missing
        if settings["nominal_set"] is not None:
            METHODS[settings["nominal_set"]].load()
        if settings["align"] is not None:
            load_opencv(settings["align"])
    except (ValueError, ImportError) as error:
        raise UsageError(with_options(str(error))) from error
    return model


def check_device(name: Any) -> None:
    """Say before the work that a device is not there."""
    from npad import devices  # noqa: PLC0415

    try:
        devices.resolve(name)
    except ValueError as error:
        raise UsageError(with_options(str(error))) from error


def command(
    app: typer.Typer, *modules: str, **defaults: str
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add a function to the application.

    A parameter ``arguments: Arguments`` of the function stands for the options of NPad: it gets
    those that were given. ``defaults`` are what the help says of them where the function has
    defaults of its own. ``--debug`` is added to all. ``modules`` are imported before the function is
    called.
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
                chosen = {argument.name: given.pop(argument.name) for argument in OPTIONS}
                given["arguments"] = {
                    name: option.value for name, option in chosen.items() if option
                }
            _run_job(function, given, modules, show_traceback)

        parameters = [*own, *(_options(defaults) if takes_model else []), debug]
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
        _import(modules)
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
        tell("error", _message(error))
        raise typer.Exit(USAGE if isinstance(error, UsageError) else FAILED) from error


def _import(modules: Sequence[str]) -> None:
    try:
        for module in modules:
            import_module(module)
    except OSError as error:
        if str(error) != "could not get source code":  # of `inspect`
            raise
        raise ImportError(
            "PyTorch reads its own source files when it is imported, and they are not there: install "
            "torch with its .py files (npad itself needs none)"
        ) from error


def _message(error: Exception) -> str:
    """What happened and what to do, in the words of the command line."""
    name = error.filename if isinstance(error, OSError) else getattr(error, "path", None)
    named = "" if name is None else f"{shown(str(name))}: "
    if isinstance(error, OSError) and error.strerror:
        text = (
            f"{named}{error.strerror.lower()}; check the path, its permissions and the space "
            "on its disk"
        )
    elif isinstance(error, UsageError):
        return str(error)
    elif isinstance(error, REPORTED):
        text = str(error) or type(error).__name__
    else:
        text = f"internal error: {type(error).__name__}: {error}; please report it with --debug"
    named = named if text.startswith(named) else ""
    return named + with_options(text.removeprefix(named))


_SIZES = [option.name for option in OPTIONS if "HxW" in option.values]


def with_options(text: str) -> str:
    """A message with options in the place of arguments: `seed must be`, `seed=3`, `skip_bad=True`."""
    more = ("skip_bad", "good", "groups", "statistics", "checkpoint", "every")
    names = "|".join([*(argument.name for argument in OPTIONS), *more])
    text = re.sub(r"^((NPad|Calibration|GroupedCalibration)(\.\w+)?|npad): ", "", text)
    text = re.sub(rf"^({names})(?=:| must| \[| ')", lambda m: _option_name(m[1]), text)
    text = re.sub(rf"(?<![^\s(])({names})=(\(\d*,[\d, ]*\)|\(\)|None\b)", _given_as_option, text)
    return re.sub(
        rf"(?<![^\s(])({names})=(?:True\b)?(?=([^\s`),;])?)",
        lambda m: _option_name(m[1]) + (" " if m[2] else ""),  # but leave what is part of a path
        text,
    )


def _given_as_option(match: re.Match[str]) -> str:
    """Numbers as an option takes them: `image_size=(192, 320)`, `layers=(2,)`; and nothing."""
    numbers = re.findall(r"\d+", match[2])
    joined = ("x" if match[1] in _SIZES else ",").join(numbers)
    return f"{_option_name(match[1])} {joined or 'none'}"


def _option_name(argument: str) -> str:
    return "--" + {"groups": "group"}.get(argument, argument).replace("_", "-")


def tell(kind: str, text: str) -> None:
    """Write one line on standard error."""
    one_line = re.sub(r"\s*[\n\r]\s*", " ", text.strip())  # names may hold other spaces
    one_line = re.sub(r"\\udc([89a-f][\da-f])", r"\\x\1", one_line)  # a byte, as Python quotes it
    print(f"npad: {kind}: {shown(one_line)}", file=sys.stderr)


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


def _again(lost: Any) -> None:
    """Interrupt once more: Python drops what is raised in a destructor, and the job would go on."""
    if issubclass(lost.exc_type, KeyboardInterrupt):
        threading.Timer(0.05, signal.raise_signal, (signal.SIGINT,)).start()  # outside of it
    else:
        sys.__unraisablehook__(lost)


def run(app: typer.Typer, args: Sequence[str] | None = None) -> NoReturn:
    """Run the program and exit: 0, 1 (failed), 2 (usage), 130 (Ctrl-C) or 141 (closed pipe)."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is ignored
        signal.signal(signal.SIGINT, _interrupt)
    told = deque[str](maxlen=1000)  # a fit with each seed meets the same images

    def warn(message: Warning | str, *_: object, **__: object) -> None:
        if str(message) not in told:
            tell("warning", with_options(str(message)))
        told.append(str(message))

    warnings.showwarning = warn
    sys.unraisablehook = _again
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
        # A bar that tqdm has just drawn, and does not know of yet, stays unless its line is erased.
        erased = "\r\x1b[K" if sys.stderr.isatty() else ""
        print(f"{erased}npad: interrupted", file=sys.stderr)
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
        tell("error", f"{error.format_message()} (see {path} --help)")
        return USAGE
    return code or 0
