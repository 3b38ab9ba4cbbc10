"""What a watch has to know after a restart, beside the rows that it has written: one file of JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from npad._version import __version__
from npad.atomic_file import replacing
from npad.calibration import Calibration, DriftMonitor
from npad.cli.program import UsageError
from npad.detector import NPad
from npad.file_names import shown
from npad.nominal_scores import Group

__all__ = ["STATE", "Monitors", "WatchState", "calibration_digest", "model_digest"]

STATE = "watch.json"
FORMAT = 1


class Monitors:
    """A monitor of drift for each group of images, which begins with the group's first image.

    Parameters
    ----------
    model : calibrated
    false_alarm_bound : of each monitor
    known : monitors that go on
    """

    def __init__(
        self, model: NPad, false_alarm_bound: float, known: Mapping[Group | None, DriftMonitor]
    ) -> None:
        assert model.calibration_ is not None
        self._nominal = model.calibration_
        self.false_alarm_bound = false_alarm_bound
        self._monitors = dict(known)

    def __getitem__(self, group: Group | None) -> DriftMonitor:
        if group not in self._monitors:
            nominal = self._nominal
            own = nominal.scores
            if nominal.groups is not None:
                own = own[[one == group for one in nominal.groups]]
            self._monitors[group] = DriftMonitor(Calibration(own), self.false_alarm_bound)
        return self._monitors[group]

    def raised(self) -> dict[Group | None, DriftMonitor]:
        """Those that are."""
        return {g: m for g, m in self._monitors.items() if m.raised_at is not None}

    def to_json(self) -> list[dict[str, Any]]:
        """As `WatchState` keeps them."""
        return [{"group": group, **m.state()} for group, m in self._monitors.items()]


@dataclass
class WatchState:
    """What stands in the file.

    Attributes
    ----------
    folders : that are watched, absolute
    model, calibration : digests; no calibration where the model has none
    false_alarm_bound : of the monitors
    tables : bytes of each table when the monitors were as they are here
    monitors : state and group of each
    """

    folders: list[str]
    model: str
    calibration: str | None
    false_alarm_bound: float | None
    tables: dict[str, int] = field(default_factory=dict)
    monitors: list[dict[str, Any]] = field(default_factory=list)

    def save(self, folder: Path) -> None:
        """Replace the file as a whole."""
        values = {"format": FORMAT, "npad_version": __version__, **vars(self)}
        with replacing(folder / STATE) as file:
            file.write(json.dumps(values).encode())

    @classmethod
    def load(cls, folder: Path) -> WatchState | None:
        """What was saved; None where nothing was.

        Raises
        ------
        UsageError
            The file is damaged, or another version's.
        """
        path = folder / STATE
        if not path.exists():
            return None
        try:
            values = json.loads(path.read_bytes())
            if not isinstance(values, dict) or values.get("format") != FORMAT:
                raise ValueError(f"its format is not {FORMAT}")
            state = cls(**{f.name: values[f.name] for f in fields(cls)})
            state._check()
            state.known_monitors()
        except (ValueError, KeyError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else error
            raise UsageError(
                f"{shown(path)} is not what a watch of this npad leaves ({reason}): put back the file "
                "that was there, or give another folder with --output"
            ) from error
        return state

    def _check(self) -> None:
        kinds: dict[str, Any] = {
            "folders": list,
            "model": str,
            "calibration": str | None,
            "false_alarm_bound": float | None,
            "tables": dict,
            "monitors": list,
        }
        for name, kind in kinds.items():
            if not isinstance(getattr(self, name), kind):
                raise ValueError(f"{name} is {getattr(self, name)!r:.40}")
        for size in self.tables.values():
            if not isinstance(size, int) or size < 0:
                raise ValueError(f"tables has {size!r:.40}")

    def known_monitors(self) -> dict[Group | None, DriftMonitor]:
        """Of each group, the monitor as it was.

        Raises
        ------
        ValueError
            One of them is none.
        """
        found: dict[Group | None, DriftMonitor] = {}
        for values in self.monitors:
            monitor = DriftMonitor.from_state(values)
            group = values.get("group")
            if not isinstance(group, str | int | None):
                raise ValueError(f"a monitor's group is {group!r:.40}")
            found[group] = monitor
        return found


def model_digest(model: NPad) -> str:
    """SHA-256 of what the scores of a fitted model depend on, whatever its file."""
    settings = model.settings_.changed_by(model.get_params())
    about = {"backbones": model.backbones_, "size": settings.size, **settings.scoring}
    digest = sha256(json.dumps(about, sort_keys=True).encode())
    for member in model.members_:
        for one in fields(member):
            value = getattr(member, one.name)
            if isinstance(value, Tensor):
                flat = value.detach().cpu().contiguous().flatten()
                digest.update(one.name.encode() + str(tuple(value.shape)).encode())
                digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def calibration_digest(model: NPad) -> str | None:
    """SHA-256 of the scores that a model was calibrated with; None where it was not."""
    if model.calibration_ is None:
        return None
    return sha256(json.dumps(model.calibration_.to_json(), sort_keys=True).encode()).hexdigest()
