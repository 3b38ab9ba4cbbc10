"""`npad predict --watch`: score what appears in folders, until it is told to end.

A row of scores.jsonl is all that says that an image is done. It is on the disk before the next batch
is scored. What else there is follows from the rows and can be made again: the CSV tables, the monitors
of drift, the ids of the images that are done. From time to time the state of the monitors is saved with
the sizes of the tables at that moment, so that a restart has few rows to go through again. Thus a kill
at any moment neither loses a row nor doubles one.
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from npad.calibration import DriftMonitor
from npad.cli.arrivals import Arrivals, Image
from npad.cli.output_folder import alone_in
from npad.cli.prediction_files import PredictionFiles, alike, named
from npad.cli.program import UsageError, tell, with_options
from npad.cli.score_tables import REGIONS, SCORES, LiveTables, Row
from npad.cli.watch_state import Monitors, WatchState, calibration_digest, model_digest
from npad.detector import NPad
from npad.file_names import shown
from npad.images.folders import search
from npad.images.roi import is_mask
from npad.nominal_scores import Group
from npad.scoring.decisions import decide_by
from npad.scoring.prediction import Prediction

__all__ = ["Watch", "nominal_colors"]

BOUND = 0.01  # of false alarms of drift
SAVED_EVERY = 60.0  # seconds after which the monitors are saved
SAVING = 0.05  # of the time at most, as their states grow

# The groups of images that come from some folders, as predict_batches takes them.
GroupsOf = Callable[[Sequence[str], Sequence[Path]], Any]


def nominal_colors(model: NPad) -> tuple[float, float]:
    """Ends of the overlays' colours by what nominal maps reach, for a run without an end.

    Cold is what half of the nominal images reach somewhere; the colours are laid on in full at the map
    threshold, in the middle of the scale.

    Parameters
    ----------
    model : calibrated; of groups, the highest threshold counts

    Raises
    ------
    NotCalibratedError
        As ``model.map_threshold_``.
    ValueError
        As ``model.map_threshold_``.
    """
    assert model.calibration_ is not None
    threshold = model.map_threshold_
    highest = max(threshold.values()) if isinstance(threshold, dict) else threshold
    low = float(np.median(model.calibration_.map_maxima))
    return low, max(2 * highest - low, float(np.nextafter(np.float32(low), np.inf)))


@dataclass
class Watch:
    """A watch of folders.

    Parameters
    ----------
    model : fitted
    folders : of images; nothing in them is changed
    output : folder of the results
    groups_of : the groups of images in these folders
    every : seconds between two looks at the folders
    until_idle : ends it when no image has been there to score for as many seconds; None: never
    patience : as for `Arrivals`
    drift_bound : of the monitors; None: as before, or 0.01
    new_monitor : begin with other monitors in an output folder that has some
    maps, overlays, masks, color_range : as for `PredictionFiles`

    Attributes
    ----------
    n_scored, n_anomalous : images of this run
    ended_by : the signal that ended it, or None

    Raises
    ------
    ImageError
        A folder that cannot be read.
    ValueError
        Groups that do not fit the calibration; too few images in it for the rate asked for.
    """

    model: NPad
    folders: Sequence[Path]
    output: Path
    groups_of: GroupsOf
    every: float = 1.0
    until_idle: float | None = None
    patience: float = 10.0
    drift_bound: float | None = None
    new_monitor: bool = False
    maps: bool = False
    overlays: bool = True
    masks: bool = False
    color_range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        self.n_scored = self.n_anomalous = 0
        self.ended_by: int | None = None
        self.folders = [Path(os.path.abspath(folder)) for folder in self.folders]  # noqa: PTH100
        self._base = Path(os.path.commonpath(self.folders))
        self._decided = self.model.calibration_ is not None
        settings = self.model.settings_.changed_by(self.model.get_params())
        for folder in self.folders:
            search(folder)
        ones = [str(folder / "image") for folder in self.folders]
        # What is wrong with the groups or the calibration is told before the first image comes.
        decide_by(self.model.calibration_, settings, self.groups_of(ones, self.folders), len(ones))

    def below(self, path: str) -> Path:
        """A path below the deepest folder that holds all that is watched."""
        return Path(path).relative_to(self._base)

    def run(self) -> None:
        """Watch until a signal ends it, or there is nothing more to do.

        Raises
        ------
        UsageError
            The output folder is of another watch, model or calibration.
        OSError
            The output folder cannot be written.
        """
        with alone_in(self.output):
            state = self._state()
            tables = LiveTables(self.output, decided=self._decided, sizes=state.tables)
            inputs: dict[str, Path] = {}
            files = PredictionFiles(
                self.output,
                inputs,
                maps=self.maps,
                overlays=self.overlays,
                decided=self._decided,
                masks=self.masks,
                color_range=self.color_range,
                tables=tables,
            )
            with files, _Ending() as ending:
                run = _Run(self, state, tables, files, inputs, ending)
                run.catch_up()
                run.until_the_end()
        self.n_scored, self.n_anomalous = files.n_scored, files.n_anomalous
        self.ended_by = ending.signal

    def _state(self) -> WatchState:
        """That of the output folder, if this watch may go on there; or a new one, which is saved."""
        now = WatchState(
            [str(folder) for folder in self.folders],
            model_digest(self.model),
            calibration_digest(self.model),
            None if not self._decided else BOUND if self.drift_bound is None else self.drift_bound,
        )
        known = WatchState.load(self.output)
        if known is None:
            there = [name for name in (*SCORES, REGIONS) if (self.output / name).exists()]
            if there:
                raise UsageError(
                    f"{shown(self.output / there[0])} is of a run that did not watch: give another "
                    "folder with --output"
                )
            now.save(self.output)
            return now
        self._check(known, now)
        now.tables, now.monitors = known.tables, known.monitors
        if self.new_monitor:
            now.monitors = []  # and the rows up to now are not theirs; see `_Run.catch_up`
        elif self.drift_bound is None:
            now.false_alarm_bound = known.false_alarm_bound
        return now

    def _check(self, known: WatchState, now: WatchState) -> None:
        """Whether a watch may go on."""
        out, other = shown(self.output), "give another folder with --output"
        if set(known.folders) != set(now.folders):
            folders = ", ".join(map(shown, known.folders))
            raise UsageError(f"{out} is of a watch of {folders}: watch the same, or {other}")
        if (known.calibration is None) != (now.calibration is None):
            was, is_ = ("is", "was not") if known.calibration is None else ("is not", "was")
            raise UsageError(
                f"the model {was} calibrated, and that of {out} {is_}, so that their rows have other "
                f"columns: {other}"
            )
        if self.new_monitor:
            return
        go_on = f"go on in it with --new-monitor, or {other}"
        if known.model != now.model:
            raise UsageError(f"{out} is of a watch with another model: {go_on}")
        if known.calibration != now.calibration:
            raise UsageError(f"the model was calibrated again since it watched into {out}: {go_on}")
        if self.drift_bound not in (None, known.false_alarm_bound):
            raise UsageError(
                f"the monitor of {out} has --drift-bound {known.false_alarm_bound:g}: leave it as "
                f"it is, or {go_on}"
            )


class _Run:
    """A watch at work."""

    def __init__(
        self,
        watch: Watch,
        state: WatchState,
        tables: LiveTables,
        files: PredictionFiles,
        inputs: dict[str, Path],
        ending: _Ending,
    ) -> None:
        self._watch = watch
        self._state = state
        self._tables = tables
        self._files = files
        self._inputs = inputs
        self._ending = ending
        self._monitors: Monitors | None = None
        if state.false_alarm_bound is not None:
            known = state.known_monitors()
            self._monitors = Monitors(watch.model, state.false_alarm_bound, known)
        self._arrivals = Arrivals(watch.folders, map(_image_of, tables.rows()), watch.patience)
        self._saved = time.monotonic()
        self._saving = 0.0  # seconds that it took
        self._unsaved = False

    def catch_up(self) -> None:
        """Take in the rows that were written after the monitors were saved."""
        for row in self._tables.catch_up():
            if self._monitors is not None and not self._watch.new_monitor:
                self._monitors[row.get("group")].update([row["score"]])
        self._save()
        if self._monitors is not None:
            for group, monitor in self._monitors.raised().items():
                _tell_of_drift(group, monitor)

    def until_the_end(self) -> None:
        """Look, score, wait."""
        idle = self._watch.until_idle
        busy = time.monotonic()
        while not self._ending.signal:
            images = self._without_masks(self._arrivals.look())
            if images:
                self._score(images)
            if images or self._arrivals.are_expected:
                busy = time.monotonic()
            elif idle is not None and time.monotonic() - busy >= idle:
                break
            self._save_if_due()
            self._ending.wait(self._watch.every)
        if self._unsaved:
            self._save()

    def _without_masks(self, images: Sequence[Image]) -> list[Image]:
        """Those that are no region of interest of an image."""
        pattern = self._watch.model.rois
        left = []
        for image in images:
            if pattern is not None and is_mask(image.path, pattern):
                self._arrivals.done(image)
            else:
                left.append(image)
        return left

    def _score(self, images: Sequence[Image]) -> None:
        """Score images; each batch is on the disk before the next."""
        by_path = {image.path: image for image in images}
        self._inputs.clear()
        self._inputs.update(self._pictures(images))
        watch, paths = self._watch, list(by_path)
        groups = watch.groups_of(paths, watch.folders)
        group_of: Mapping[str, Group | None] = (
            dict(zip(paths, groups, strict=True))
            if isinstance(groups, list)
            else dict.fromkeys(paths, groups)
        )
        predictions = watch.model.predict_batches(
            paths, skip_bad=True, map_size="model", keep_images=watch.overlays, groups=groups
        )
        for prediction in predictions:
            for path, reason in prediction.skipped:
                if self._arrivals.failed(by_path[path]):
                    _tell_of_skipped(path, reason)
            self._write(prediction, by_path, group_of)
            prediction.images.clear()  # whoever refers to it: the next ones may be as large
            self._save_if_due()
            if self._ending.signal:
                return

    def _write(
        self,
        prediction: Prediction,
        by_path: Mapping[str, Image],
        group_of: Mapping[str, Group | None],
    ) -> None:
        more: dict[str, dict[str, Any]] = {}
        for path, score in zip(prediction.paths, prediction.scores.tolist(), strict=True):
            image = by_path[path]
            if Image.found(path) not in (None, image):
                continue  # it was written to while it was read: it comes again
            row: dict[str, Any] = {"bytes": image.n_bytes, "modified": image.modified}
            if group_of[path] is not None:
                row["group"] = group_of[path]
            if self._monitors is not None:
                monitor = self._monitors[group_of[path]]
                before = monitor.raised_at
                row["drift_raised"] = monitor.update([score])
                row["drift"] = monitor.martingale
                if monitor.raised_at != before:
                    _tell_of_drift(group_of[path], monitor, path)
                    self._saved = -math.inf  # whoever looks at the state shall know
            more[path] = row
        self._files.add(prediction, more)
        self._unsaved = self._unsaved or bool(more)
        for path in more:
            self._arrivals.done(by_path[path])

    def _pictures(self, images: Sequence[Image]) -> dict[str, Path]:
        """Where pictures go: by what lies in the folders alone, not by the order in which it came."""
        below = self._watch.below
        n_alike = Counter(alike(below(path)) for path in self._arrivals.present)
        places = {image.path: below(image.path) for image in images}
        return {path: named(p, n_alike[alike(p)] > 1) for path, p in places.items()}

    def _save_if_due(self) -> None:
        pause = max(SAVED_EVERY, self._saving / SAVING)
        if self._unsaved and time.monotonic() - self._saved >= pause:
            self._save()

    def _save(self) -> None:
        start = time.monotonic()
        self._state.tables = self._tables.sync()
        if self._monitors is not None:
            self._state.monitors = self._monitors.to_json()
        self._state.save(self._watch.output)
        self._unsaved = False
        self._saved = time.monotonic()
        self._saving = self._saved - start


class _Ending:
    """Ctrl-C or SIGTERM ends the watch after the batch that is on its way; a second Ctrl-C at once.

    Attributes
    ----------
    signal : which has come, or None
    """

    signal: int | None = None

    def __enter__(self) -> _Ending:
        found = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        self._before = {
            n: handler for n, handler in found.items() if handler not in (signal.SIG_IGN, None)
        }
        for number in self._before:
            signal.signal(number, self)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal == number:
            raise KeyboardInterrupt
        self.signal = number

    def wait(self, seconds: float) -> None:
        """Until a signal comes, or time is up. A sleep goes on after a signal, so it is short."""
        end = time.monotonic() + seconds
        while not self.signal and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 0.1))


def _image_of(row: Row) -> Image:
    try:
        return Image(row["path"], row["bytes"], row["modified"])
    except KeyError as error:
        raise UsageError(
            f"{SCORES[1]} in the folder of --output has a row without {error}, which no watch has "
            "written: give another folder with --output"
        ) from error


def _tell_of_drift(group: Group | None, monitor: DriftMonitor, path: str | None = None) -> None:
    of = "" if group is None else f" of group {group!r}"
    at = "" if path is None else f", {shown(path)},"
    tell(
        "warning",
        f"drift: at image {monitor.raised_at}{of}{at} the scores have ceased to be like those of the "
        f"calibration (evidence 10^{monitor.martingale:.1f}, raised at 10^"
        f"{-math.log10(monitor.false_alarm_bound):.1f}); find what has changed, calibrate again, and "
        "go on with --new-monitor",
    )


def _tell_of_skipped(path: str, reason: str) -> None:
    tell("skipped", f"{shown(path)}: {with_options(reason)}")
