"""The command line: from `fit` to `info`, a function each."""

from __future__ import annotations

import json
import math
import signal
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from npad._version import __version__
from npad.atomic_file import naming
from npad.cli.output_folder import alone_in
from npad.cli.program import (
    Arguments,
    UsageError,
    check_device,
    command,
    model_option,
    new_model,
    parsed,
    run,
    tell,
    with_options,
)
from npad.file_names import shown
from npad.settings import CHECKPOINT_EVERY, LEAST_RATE, Settings

if TYPE_CHECKING:  # they import libraries
    from npad.detector import NPad
    from npad.evaluation.datasets import Category

__all__ = ["app", "main"]

app = typer.Typer(
    name="npad",
    help="Find defects in images, having seen only images without defects.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

MEASURE = ("npad.detector", "npad.cli.evaluation_files")  # modules of evaluate and demo

Folder = Annotated[Path, typer.Argument(exists=True, file_okay=False, metavar="DIR")]
ModelFile = Annotated[Path, typer.Argument(exists=True, dir_okay=False, metavar="MODEL")]
NewModel = Annotated[
    Path, typer.Option("--output", "-o", metavar="MODEL", help="Model file to write.")
]
WithStatistics = Annotated[
    bool,
    typer.Option(
        "--statistics",
        help="Write what merging and fitting further need, too: several times the bytes.",
    ),
]
Weights = Annotated[
    Any,
    typer.Option(
        parser=parsed("weights"),
        metavar="FILE[,FILE]",
        help="The backbone's weights, if not where they were; one file for each of several.",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars, no summary.")]
SkipBad = Annotated[
    bool, typer.Option("--skip-bad", help="Go on after a file that cannot be read, and list it.")
]
Threads = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="CPU threads. [default: as torch chooses]"),
]


def main() -> None:
    """Run the program named on the command line."""
    run(app)


@app.callback()
def program(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            is_eager=True,
            help="Show the version.",
            callback=lambda asked: _show_version() if asked else None,
        ),
    ] = False,
) -> None:
    """Find defects in images, having seen only images without defects."""


def _show_version() -> None:
    print(f"npad {__version__}")
    raise typer.Exit


# --- fit ---


@command(app, "npad.detector")
def fit(
    folder: Folder,
    output: NewModel,
    arguments: Arguments,
    statistics: WithStatistics = False,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False,
            metavar="FILE",
            help="Write the fit down on its way, and go on from this file if it is there. Removed once "
            "the model is written.",
        ),
    ] = None,
    every: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Images from one time that the checkpoint is written to the next. "
            f"[default: {CHECKPOINT_EVERY}]",
        ),
    ] = None,
    skip_bad: SkipBad = False,
    threads: Threads = None,
    quiet: Quiet = False,
) -> None:
    """Fit a model on a folder of images without defects."""
    images = _nominal_images(folder, arguments.get("rois"))
    _check_can_be_written(output)
    if checkpoint is not None:
        _check_can_be_written(checkpoint)
        if checkpoint.resolve() == output.resolve():
            raise UsageError("--checkpoint and --output are the same file: give two")
    elif every is not None:
        raise UsageError("--every says when a checkpoint is written: give --checkpoint FILE, too")
    _set_threads(threads)
    model = new_model(arguments, progress=_progress(quiet))
    model.fit(
        images,  # those that were looked at
        skip_bad=skip_bad,
        statistics=statistics,
        checkpoint=checkpoint,
        every=every or CHECKPOINT_EVERY,
    )
    model.save(output, statistics=statistics)
    if checkpoint is not None:
        checkpoint.unlink()
    _list_skipped(model.skipped_)
    _tell_of_model(model, output, quiet)


def _tell_of_model(model: Any, path: Path, quiet: bool) -> None:
    if not quiet:
        print(
            f"{shown(path)}: {path.stat().st_size / 1e6:.1f} MB, {model.n_images_} images\n"
            + "\n".join(map(str, model.members_))
        )
        if model.calibration_ is not None:
            _tell_thresholds(model)


def _nominal_images(folder: Path, rois: str | None) -> list[Path]:
    """The images of a folder, in which none seems to show a defect, without their masks."""
    from npad.evaluation.datasets import find_bad, find_good, refuse_masks  # noqa: PLC0415
    from npad.images.folders import find_images  # noqa: PLC0415
    from npad.images.roi import without_masks  # noqa: PLC0415

    images = without_masks(find_images(folder), rois)
    good = find_good(folder, images)
    if good is not None:
        raise UsageError(
            f"{shown(folder)} seems to hold images with defects: give {shown(good)}, or use npad "
            "evaluate"
        )
    bad = find_bad(folder, images)
    if bad is not None:
        raise UsageError(
            f"{shown(bad)} seems to hold images with defects, and only good ones may be here: move it "
            f"out of {shown(folder)}, or rename it if they are good"
        )
    refuse_masks(folder, images, images)
    return list(images)


def _check_can_be_written(path: Path) -> None:
    """Fail before the work and not after it."""
    if path.is_dir():
        raise UsageError(f"{shown(path)} is a folder: give the path of a file")
    if not path.parent.is_dir():
        raise UsageError(f"{shown(path.parent)} is not a folder: make it first")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        if path.exists():
            path.open("r+b").close()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


# --- merge and shrink ---


@command(app, "npad.detector")
def merge(
    models: Annotated[
        list[Path],
        typer.Argument(
            exists=True,
            dir_okay=False,
            metavar="MODEL...",
            help="Two or more models, each with statistics: written with --statistics.",
        ),
    ],
    output: NewModel,
    statistics: WithStatistics = False,
    weights: Weights = None,
    threads: Threads = None,
    quiet: Quiet = False,
) -> None:
    """Make one model of several, as if it had been fitted on the images of all.

    The models must have been fitted with the same settings on the same backbone.
    """
    from npad.detector import NPad  # noqa: PLC0415
    from npad.model_file import ModelFileError  # noqa: PLC0415

    if len(models) < 2:
        raise UsageError("one model is nothing to merge: give two or more")
    _check_can_be_written(output)
    _set_threads(threads)
    at = models[0]

    def loaded() -> Iterator[Any]:
        nonlocal at
        for at in models:
            yield NPad.load(at, weights=weights, progress=_progress(quiet))

    others = loaded()
    model = next(others)
    try:
        model.merge(others)
    except ValueError as error:
        if isinstance(error, ModelFileError):
            raise
        raise ValueError(f"{shown(at)}: {with_options(str(error))}") from error
    model.save(output, statistics=statistics)
    _tell_of_model(model, output, quiet)


@command(app, "npad.detector")
def shrink(
    model_file: ModelFile,
    output: NewModel,
    factor_dtype: Annotated[Any, model_option("factor_dtype")] = None,
    weights: Weights = None,
    threads: Threads = None,
    quiet: Quiet = False,
) -> None:
    """Write a model without its statistics, and with its factors in fewer bytes.

    It scores as before, but for what a smaller dtype of the factors rounds; it can no longer be merged
    or fitted further.
    """
    from npad.detector import NPad  # noqa: PLC0415

    _check_can_be_written(output)
    _set_threads(threads)
    model = NPad.load(model_file, weights=weights, progress=_progress(quiet))
    model.shrink(factor_dtype).save(output)
    _tell_of_model(model, output, quiet)


# --- calibrate and predict ---

Device = Annotated[str, typer.Option(metavar="DEVICE", help="Torch device.")]
BatchSize = Annotated[Any, model_option("batch_size")]
MaxPixels = Annotated[Any, model_option("max_pixels")]
Rois = Annotated[Any, model_option("rois")]
Smoothing = Annotated[Any, model_option("smoothing")]
FalseAlarmRate = Annotated[Any, model_option("false_alarm_rate")]
Confidence = Annotated[Any, model_option("confidence")]
Group = Annotated[
    str | None, typer.Option(metavar="NAME", help="The camera, lot or shift of all images.")
]
GroupByFolder = Annotated[
    bool,
    typer.Option(
        "--group-by-folder",
        help="The PATH that an image comes from names its group: a folder, or the folder of a file.",
    ),
]


@command(app, "npad.detector")
def calibrate(
    model_file: ModelFile,
    paths: Annotated[
        list[Path],
        typer.Argument(
            exists=True,
            metavar="PATH",
            help="Images without defects that were not fitted, and folders of them.",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Model file to write. [default: MODEL, which is replaced whole]",
            show_default=False,
        ),
    ] = None,
    smoothing: Smoothing = None,
    false_alarm_rate: FalseAlarmRate = None,
    confidence: Confidence = None,
    group: Group = None,
    group_by_folder: GroupByFolder = False,
    weights: Weights = None,
    device: Device = "cpu",
    batch_size: BatchSize = None,
    max_pixels: MaxPixels = None,
    rois: Rois = None,
    skip_bad: SkipBad = False,
    threads: Threads = None,
    quiet: Quiet = False,
) -> None:
    """Choose thresholds with images without defects that were not fitted.

    Of good images to come, at most the share --false-alarm-rate is then called anomalous by predict.
    """
    _set_threads(threads)
    check_device(device)
    target = model_file if output is None else output
    _check_can_be_written(target)
    model = _loaded(
        *(model_file, device, weights, _progress(quiet)),
        smoothing=smoothing,
        false_alarm_rate=false_alarm_rate,
        confidence=confidence,
        batch_size=batch_size,
        max_pixels=max_pixels,
        rois=rois,
    )
    images = [image for path in paths for image in _of_path(path, model.rois)]
    groups = _groups(group, group_by_folder, images, paths)
    model.calibrate(images, groups=groups, skip_bad=skip_bad)
    model.save(target, statistics=model.has_statistics)
    if not quiet:
        print(f"{shown(target)}:")
        _tell_thresholds(model)


def _tell_thresholds(model: NPad) -> None:
    rate = f"false-alarm rate {model.false_alarm_rate:g}"
    sure = "" if model.confidence is None else f", confidence {model.confidence:g}"
    print(f"calibrated with {model.calibration_}, {rate}{sure}")
    scores, maps = (_by_group(x) for x in (model.threshold_, model.map_threshold_))
    for group, threshold in scores.items():
        of = f"{shown(group)}: " if group else ""
        marked = f"marked above {maps[group]:.4g} of the map"
        print(f"{of}anomalous above a score of {threshold:.4g}, {marked}")


def _by_group(thresholds: Any) -> dict[str, float]:
    groups = thresholds if isinstance(thresholds, dict) else {"": thresholds}
    return {str(group): threshold for group, threshold in groups.items()}


def _of_path(path: Path, rois: str | None) -> list[Path]:
    return _nominal_images(path, rois) if path.is_dir() else [path]


def _groups(
    group: str | None, by_folder: bool, images: Iterable[str | Path], paths: Sequence[Path]
) -> Any:
    """As NPad takes them; `paths` are those given, from which the images come."""
    if not by_folder:
        return group
    if group is not None:
        raise UsageError("--group and --group-by-folder exclude each other")
    names = {path: (path if path.is_dir() else path.parent).resolve().name for path in paths}
    places = ((Path(image), *Path(image).parents) for image in images)
    return [next(names[place] for place in found if place in names) for found in places]


def _loaded(path: Path, device: str, weights: Any, progress: bool | None, **given: Any) -> NPad:
    """A fitted model with those of its arguments set that were given."""
    from npad.detector import NPad  # noqa: PLC0415

    model = NPad.load(path, device=device, weights=weights, progress=progress)
    return model.set_params(**{name: value for name, value in given.items() if value is not None})


def _color_range(text: str) -> tuple[float, float]:
    try:
        low, high = (float(end) for end in text.split(","))
    except ValueError:
        low = high = 0.0
    if not low < high:
        raise typer.BadParameter(f"{text!r} is not LOW,HIGH")
    return low, high


def _seconds(least: float) -> Callable[[str], float]:
    def value(text: str) -> float:
        try:
            seconds = float(text)
        except ValueError:
            seconds = math.nan
        if not least <= seconds < math.inf:
            raise typer.BadParameter(f"{text!r} is no number of seconds from {least:g} on")
        return seconds

    return value


def _bound(text: str) -> float:
    try:
        bound = float(text)
    except ValueError:
        bound = math.nan
    if not LEAST_RATE <= bound < 1:
        raise typer.BadParameter(f"{text!r} is no number from {LEAST_RATE} to below 1")
    return bound


@command(app, "npad.detector", "npad.cli.prediction_files")
def predict(
    model_file: ModelFile,
    paths: Annotated[
        list[Path],
        typer.Argument(exists=True, metavar="PATH", help="Images, and folders of images."),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="OUT", help="Folder to write into.")
    ],
    maps: Annotated[
        bool, typer.Option("--maps", help="Also write the anomaly maps, as float32 TIFF.")
    ] = False,
    overlays: Annotated[
        bool, typer.Option("--overlays/--no-overlays", help="Draw the maps over the images.")
    ] = True,
    color_range: Annotated[
        Any,
        typer.Option(
            parser=_color_range,
            metavar="LOW,HIGH",
            help="Map values at the ends of the overlays' colours. [default: the median and the "
            "99.9th percentile of this run]",
        ),
    ] = None,
    masks: Annotated[
        bool, typer.Option("--masks", help="Also write what is marked, as PNG of one bit.")
    ] = False,
    smoothing: Smoothing = None,
    false_alarm_rate: FalseAlarmRate = None,
    confidence: Confidence = None,
    group: Group = None,
    group_by_folder: GroupByFolder = False,
    weights: Weights = None,
    device: Device = "cpu",
    batch_size: BatchSize = None,
    max_pixels: MaxPixels = None,
    rois: Rois = None,
    watch: Annotated[
        bool,
        typer.Option(
            "--watch",
            help="Score what is in the folders and what appears there, until Ctrl-C; go on after a "
            "restart.",
        ),
    ] = False,
    every: Annotated[
        Any,
        typer.Option(
            parser=_seconds(0.01),
            metavar="SECONDS",
            help="With --watch: between two looks at the folders. [default: 1]",
        ),
    ] = None,
    until_idle: Annotated[
        Any,
        typer.Option(
            parser=_seconds(0),
            metavar="SECONDS",
            help="With --watch: end when there was nothing to score for as long. [default: never]",
        ),
    ] = None,
    patience: Annotated[
        Any,
        typer.Option(
            parser=_seconds(0),
            metavar="SECONDS",
            help="With --watch: how long an unchanged file is tried that cannot be read. [default: 10]",
        ),
    ] = None,
    drift_bound: Annotated[
        Any,
        typer.Option(
            parser=_bound,
            metavar="RATE",
            help="With --watch: probability of ever telling of drift where there is none. "
            "[default: 0.01]",
        ),
    ] = None,
    new_monitor: Annotated[
        bool,
        typer.Option(
            "--new-monitor",
            help="With --watch: watch anew for drift in an OUT that is there, once it is calibrated "
            "again.",
        ),
    ] = False,
    skip_bad: SkipBad = False,
    threads: Threads = None,
    quiet: Quiet = False,
) -> None:
    """Score images with a fitted model.

    Writes OUT/scores.csv, OUT/scores.jsonl, OUT/overlays and, with --maps, OUT/maps. A higher score
    is more anomalous. A model that was calibrated also says which images are, and where.
    """
    from npad.cli.prediction_files import PredictionFiles, find_inputs  # noqa: PLC0415
    from npad.images.roi import without_masks  # noqa: PLC0415

    times = {"every": every, "until_idle": until_idle, "patience": patience}
    of_watch = {**times, "drift_bound": drift_bound, "new_monitor": new_monitor or None}
    if not watch:
        for name, value in of_watch.items():
            if value is not None:
                raise UsageError(f"--{name.replace('_', '-')} is of use with --watch only")
    _set_threads(threads)
    check_device(device)
    progress = _progress(quiet)
    inputs = {} if watch else find_inputs(paths, output)
    model = _loaded(
        *(model_file, device, weights, progress),
        smoothing=smoothing,
        false_alarm_rate=false_alarm_rate,
        confidence=confidence,
        batch_size=batch_size,
        max_pixels=max_pixels,
        rois=rois,
    )
    inputs = {image: inputs[image] for image in without_masks(inputs, model.rois)}
    decided = model.calibration_ is not None
    if masks and not decided:
        raise UsageError(f"--masks needs thresholds: choose them with npad calibrate {model_file}")
    pictures = {"maps": maps, "overlays": overlays, "masks": masks, "color_range": color_range}
    if watch:
        groups_of = partial(_groups, group, group_by_folder)
        given = {name: value for name, value in of_watch.items() if value is not None}
        _watch(model, model_file, paths, output, groups_of, quiet, **given, **pictures)
        return
    predictions = model.predict_batches(
        list(inputs),
        skip_bad=skip_bad,
        map_size="model",
        keep_images=overlays,
        groups=_groups(group, group_by_folder, inputs, paths),
    )
    files = PredictionFiles(output, inputs, decided=decided, **pictures, progress=progress)
    skipped = []
    with alone_in(output), files:
        for prediction in predictions:
            files.add(prediction)
            prediction.images.clear()  # whoever refers to it: the next ones may be as large
            skipped += prediction.skipped
        _list_skipped(skipped)
        if not files.n_scored:
            raise ValueError(f"none of the {len(inputs)} images could be read")
        files.finish()
    if files.n_unaligned:
        tell(
            "warning",
            f"{files.n_unaligned} of {files.n_scored} images could not be registered to the template "
            f"and were scored as they came; {shown(output / 'scores.jsonl')} says why",
        )
    if not quiet:
        _tell_what_was_scored(output, files.n_scored, files.n_anomalous, decided)
        if overlays:
            low, high = files.color_range or (math.nan, math.nan)
            print(f"{shown(output / 'overlays')}: colours from {low:.4g} to {high:.4g}")


def _watch(
    model: Any,
    model_file: Path,
    paths: Sequence[Path],
    output: Path,
    groups_of: Callable[[Sequence[str], Sequence[Path]], Any],
    quiet: bool,
    **options: Any,
) -> None:
    from npad.cli.watching import Watch, nominal_colors  # noqa: PLC0415

    for path in paths:
        if not path.is_dir():
            raise UsageError(f"{shown(path)} is no folder: --watch watches folders")
    decided = model.calibration_ is not None
    if not decided:
        how = f"npad calibrate {shown(model_file)}"
        if "drift_bound" in options or "new_monitor" in options:
            raise UsageError(f"drift is watched for where the model is calibrated: {how}")
        if options["overlays"] and options["color_range"] is None:
            raise UsageError(
                "a watch draws overlays before it knows all maps, and the model is not calibrated: "
                f"give --color-range or --no-overlays, or choose thresholds with {how}"
            )
        if not quiet:
            tell("note", f"the model is not calibrated, so that nothing watches for drift: {how}")
    elif options["overlays"] and options["color_range"] is None:
        options["color_range"] = nominal_colors(model)
    watch = Watch(model, paths, output, groups_of, **options)
    if not quiet:
        print(f"{', '.join(map(shown, paths))}: watched; Ctrl-C ends it", flush=True)
    watch.run()
    if not quiet:
        _tell_what_was_scored(output, watch.n_scored, watch.n_anomalous, decided)
    if watch.ended_by == signal.SIGINT:
        raise KeyboardInterrupt


def _tell_what_was_scored(output: Path, n_scored: int, n_anomalous: int, decided: bool) -> None:
    alarms = f", {n_anomalous} anomalous" if decided else ""
    print(f"{shown(output / 'scores.csv')}: {n_scored} images{alarms}")


# --- evaluate ---


def _seeds(text: str) -> tuple[int, ...]:
    try:
        seeds = tuple(int(seed) for seed in text.split(","))
    except ValueError:
        seeds = ()
    if not seeds or len(set(seeds)) < len(seeds):
        raise typer.BadParameter(f"{text!r} is not a list of different numbers such as 0,1,2")
    return seeds


Report = Annotated[
    Path, typer.Option("--output", "-o", metavar="OUT", help="Folder of the report.")
]
Seeds = Annotated[
    Any,
    typer.Option(
        parser=_seeds, metavar="N,N,...", help="Fit with each seed: mean and spread of the metrics."
    ),
]


@command(app, *MEASURE)
def evaluate(
    folder: Folder,
    arguments: Arguments,
    output: Report = Path("npad-report"),
    good: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Name of the folders of good images. [default: good]"),
    ] = None,
    seeds: Seeds = None,
    skip_bad: SkipBad = False,
    threads: Threads = None,
    quiet: Quiet = False,
) -> None:
    """Fit, score and measure a data set.

    DIR is one category in the MVTec AD layout, or a folder of many. Writes OUT/report.html and
    OUT/results.json.
    """
    _set_threads(threads)
    makers = _makers(arguments, seeds, quiet)
    categories = _categories(folder, good, makers[0]().max_pixels)
    with alone_in(output):
        _evaluate(categories, makers, output, skip_bad, quiet)


@command(app, *MEASURE, backbone="the network of npad[offline]; without it filterbank")
def demo(
    arguments: Arguments,
    output: Report = Path("npad-demo"),
    seeds: Seeds = None,
    threads: Threads = None,
    quiet: Quiet = False,
) -> None:
    """Evaluate on a small woven data set.

    Makes it from --seed, with planted defects, in OUT; then does what evaluate does. Needs no
    download and about a minute.
    """
    from npad.evaluation.synthetic import make_dataset  # noqa: PLC0415
    from npad.features import offline  # noqa: PLC0415

    _set_threads(threads)
    stands_in = "backbone" not in arguments and offline.version() is None
    arguments.setdefault("backbone", "filterbank" if stands_in else offline.NETWORK)
    makers = _makers(arguments, seeds, quiet)
    if stands_in:
        text = "no pre-trained network is installed, so a fixed filter bank stands in"
        tell("note", f"{text}; {offline.INSTALL} brings one")
    seed = arguments.get("seed", 0)
    data = output / f"data-seed{seed}"
    with alone_in(output):
        if not data.exists():
            with (
                naming(data),
                tempfile.TemporaryDirectory(dir=output, prefix=".npad-") as unfinished,
            ):
                make_dataset(Path(unfinished) / "data" / "woven", seed)
                (Path(unfinished) / "data").rename(data)  # a data set that is there is whole
        categories = _categories(data, None, makers[0]().max_pixels)
        _evaluate(categories, makers, output, False, quiet)


def _makers(
    arguments: Arguments, seeds: Sequence[int] | None, quiet: bool
) -> Sequence[Callable[[], Any]]:
    """Of a model for each seed. What NPad refuses, it refuses here, before the work."""
    if seeds and "seed" in arguments:
        raise UsageError("--seed and --seeds exclude each other")
    makers = [
        partial(new_model, arguments, progress=_progress(quiet), **seed)
        for seed in ([{"seed": seed} for seed in seeds] if seeds else [{}])
    ]
    for make in makers:
        make()
    return makers


def _categories(folder: Path, good: str | None, max_pixels: int) -> Sequence[Category]:
    """What is measured. What is wrong with its folders and masks is met here, before the work."""
    from npad.evaluation.datasets import find_categories  # noqa: PLC0415
    from npad.evaluation.truth import check_masks  # noqa: PLC0415

    categories = find_categories(folder, good)
    for category in categories:
        check_masks(category, max_pixels)
    return categories


def _evaluate(
    categories: Sequence[Category],
    makers: Sequence[Callable[[], Any]],
    output: Path,
    skip_bad: bool,
    quiet: bool,
) -> None:
    from npad.cli.evaluation_files import REPORT, evaluate_all, print_table  # noqa: PLC0415

    rows, skipped = evaluate_all(
        categories, makers, output, skip_bad=skip_bad, progress=_progress(quiet)
    )
    _list_skipped(skipped)
    if not quiet:
        print_table(rows)
        print(shown(output / REPORT))


# --- plan ---


@command(app, "npad.detector", "npad.cli.plans")
def plan(
    arguments: Arguments,
    folder: Annotated[
        Path | None,
        typer.Argument(
            exists=True, file_okay=False, metavar="DIR", help="Images that would be fitted."
        ),
    ] = None,
    images: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Images to fit, where no folder is given. [default: so many that more would take no "
            "more memory]",
        ),
    ] = None,
    statistics: Annotated[
        bool, typer.Option("--statistics", help="The model is written with its statistics.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, in bytes.")] = False,
    threads: Threads = None,
) -> None:
    """Count what fitting and predicting take of the memory, and whether they fit.

    Decodes no image, and needs no weights. If they do not fit, shows which arguments do and what each
    would take, and ends with exit code 1.
    """
    from npad.cli.plans import plan_of, print_json, print_plan, short_of  # noqa: PLC0415

    if folder is not None and images is not None:
        raise UsageError("DIR and --images exclude each other: the images of DIR are counted")
    _set_threads(threads)
    found = plan_of(new_model(arguments, progress=False), folder, images, statistics)
    (print_json if as_json else print_plan)(found)
    short_of(found)


# --- backbones and fetch ---


@command(app, "npad.cli.backbones")
def backbones(
    measure: Annotated[
        bool, typer.Option("--measure", help="Time one image through each, on the CPU.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    threads: Threads = None,
) -> None:
    """List the networks that can be used here now.

    Shows where their weights come from, and the channels and grid of their default layers at 256 x
    256 pixels. Asks no network: any other model of timm is a download.
    """
    from npad.cli.backbones import available, print_backbones  # noqa: PLC0415

    _set_threads(threads)
    rows = list(available(measure))
    if as_json:
        print(json.dumps(rows, indent=1))
    else:
        print_backbones(rows)


@command(app, "npad.cli.backbones")
def fetch(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A model of timm.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="Safetensors file to write.")
    ],
    quiet: Quiet = False,
) -> None:
    """Write the weights of a network to a file.

    For a machine without a network: carry the file there and give it as --weights. It holds all
    weights, and in its metadata their source and licence.
    """
    from npad.cli.backbones import write_weights  # noqa: PLC0415

    ((name, _),) = Settings(backbone=name).networks
    if name == "filterbank":
        raise UsageError("filterbank has no weights: it needs no file")
    _check_can_be_written(output)
    digest = write_weights(name, output)
    if not quiet:
        print(f"{shown(output)}: {output.stat().st_size / 1e6:.1f} MB, SHA-256 {digest}")


# --- check and info ---


@command(app, "npad.cli.kernels")
def check(
    device: Annotated[
        str, typer.Option(metavar="DEVICE", help="Torch device, such as cuda:0, or auto.")
    ] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, for a report.")] = False,
) -> None:
    """Check that the kernels compute what they should on this machine.

    Runs every op on small, odd and large shapes beside its reference in float64. Shows the error as a
    share of what is allowed, the time of the large shape, and the share of the bandwidth of a copy.
    """
    from npad.cli.kernels import check_kernels, print_findings, print_json, wrong  # noqa: PLC0415
    from npad.devices import resolve  # noqa: PLC0415

    check_device(device)
    found = resolve(device)
    findings = check_kernels(found)
    (print_json if as_json else print_findings)(found, findings)
    names = wrong(findings)
    if names:
        raise RuntimeError(
            f"kernels are wrong on {found}: {', '.join(names)}; please report it with what `npad check "
            f"--device {found} --json` prints"
        )


@command(app, "npad.environment")
def info(
    model_file: Annotated[
        Path | None,
        typer.Argument(
            exists=True,
            dir_okay=False,
            metavar="[MODEL]",
            help="A model file, to show what it holds.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Show what is in use: versions, kernels, devices. Or, of a model file, what it holds."""
    from npad.cli.model_info import model_info  # noqa: PLC0415
    from npad.environment import info as environment  # noqa: PLC0415

    facts = environment() if model_file is None else model_info(model_file)
    if as_json:
        print(json.dumps(facts, indent=1))
        return
    flat: dict[str, Any] = {}
    for name, value in facts.items():
        flat |= value if isinstance(value, dict) else {name: value}
    width = max(map(len, flat))
    for name, value in flat.items():
        joint = f"\n{'':{width}}  " if name == "members" else ", "
        text = joint.join(map(str, value)) if isinstance(value, list | tuple) else value
        print(f"{name:{width}}  {'none' if text in (None, '') else text}")


# --- shared ---


def _progress(quiet: bool) -> bool | None:
    return False if quiet else None


def _set_threads(threads: int | None) -> None:
    import torch  # noqa: PLC0415

    if threads is not None:
        torch.set_num_threads(threads)


def _list_skipped(skipped: Sequence[tuple[str, str]]) -> None:
    for path, reason in skipped:
        tell("skipped", f"{shown(path)}: {with_options(reason)}")
