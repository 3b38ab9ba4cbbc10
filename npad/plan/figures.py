"""What a plan says, and how it is shown."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

import torch

from npad import devices
from npad.members import Member
from npad.settings import Settings

__all__ = ["MemberPlan", "Phase", "Plan"]


@dataclass(frozen=True)
class MemberPlan:
    """Bytes of a member: while it is fitted, and as it is kept.

    Attributes
    ----------
    member : which
    grid : (H, W) of the embeddings
    channels : of the embeddings, as the backbone gives them
    n_features : dimensions to which they are reduced, with ``n_features="auto"`` those with which the
        member is largest; None where all are kept
    statistics : counts, means and packed scatter of all positions
    held_out : embeddings of the images held out
    bank : embeddings among which the nominal set is chosen
    learned : bytes of each learned tensor, by its name
    """

    member: Member
    grid: tuple[int, int]
    channels: int
    n_features: int | None
    n_centroids: int
    statistics: int
    held_out: int
    bank: int
    learned: dict[str, int]

    @property
    def positions(self) -> int:
        """Of the grid."""
        return self.grid[0] * self.grid[1]

    @property
    def model(self) -> int:
        """Bytes of what a model keeps."""
        return sum(self.learned.values())

    @property
    def embedding(self) -> int:
        """Bytes of an image's embedding, as the backbone gives it."""
        return 4 * self.positions * self.channels


@dataclass(frozen=True)
class Phase:
    """A moment of the work, and what is in memory then.

    Attributes
    ----------
    name : for people
    parts : bytes, by what they are
    n_bytes : of all of them, and on a CPU what the process has kept of phases before
    """

    name: str
    parts: dict[str, int]
    n_bytes: int


@dataclass(frozen=True)
class Plan:
    """Bytes that a fit and its model take.

    Attributes
    ----------
    settings : of the model, with the size of its images
    device : where it works
    n_images : images to fit
    source_size : (height, width) of the images before they are resized; None: that of the settings
    members : bytes of each member
    backbone : bytes of the weights
    fit, predict : phases of both
    free : bytes that were free on the device; None where that is not known
    keeps_statistics : whether the fitted model keeps them, as ``fit(statistics=True)``
    n_strips : of the grid, of which one has its statistics in memory at a time; 1: all of it
    """

    settings: Settings
    device: torch.device
    n_images: int
    source_size: tuple[int, int] | None
    members: tuple[MemberPlan, ...]
    backbone: int
    fit: tuple[Phase, ...] = field(repr=False)
    predict: tuple[Phase, ...] = field(repr=False)
    free: int | None
    keeps_statistics: bool
    n_strips: int = 1

    @property
    def statistics(self) -> int:
        """Bytes of counts, means and scatter of all Gaussians."""
        return sum(member.statistics for member in self.members)

    @property
    def factor(self) -> int:
        """Bytes of the factors."""
        return sum(member.learned.get("factor", 0) for member in self.members)

    @property
    def nominal_set(self) -> int:
        """Bytes of the centroids."""
        return sum(member.learned.get("centroids", 0) for member in self.members)

    @property
    def model(self) -> int:
        """Bytes of the fitted model, ``NPad.nbytes``; with ``n_features="auto"`` at most."""
        return sum(member.model for member in self.members)

    @property
    def fit_peak(self) -> int:
        """The most that fitting takes at once."""
        return max(phase.n_bytes for phase in self.fit)

    @property
    def predict_peak(self) -> int:
        """The most that ``predict_batches`` takes at once."""
        return max(phase.n_bytes for phase in self.predict)

    @property
    def fits(self) -> bool:
        """Whether what is free is enough for both; True where that is not known."""
        return self.free is None or max(self.fit_peak, self.predict_peak) <= self.free

    def to_json(self) -> dict[str, Any]:
        """As JSON types."""
        peaks = {"fit": self.fit, "predict": self.predict}
        return {
            "settings": self.settings.to_json(),
            "device": str(self.device),
            "n_images": self.n_images,
            "keeps_statistics": self.keeps_statistics,
            "n_strips": self.n_strips,
            "source_size": self.source_size and list(self.source_size),
            "backbone": self.backbone,
            "members": [
                {
                    "member": one.member.to_json(),
                    "grid": list(one.grid),
                    "channels": one.channels,
                    "n_features": one.n_features,
                    "n_centroids": one.n_centroids,
                    "statistics": one.statistics,
                    "held_out": one.held_out,
                    "bank": one.bank,
                    **one.learned,
                }
                for one in self.members
            ],
            "statistics": self.statistics,
            "factor": self.factor,
            "nominal_set": self.nominal_set,
            "model": self.model,
            "fit_peak": self.fit_peak,
            "predict_peak": self.predict_peak,
            "free": self.free,
            "fits": self.fits,
            "phases": {
                work: [{"name": p.name, "n_bytes": p.n_bytes, "parts": p.parts} for p in phases]
                for work, phases in peaks.items()
            },
        }

    def __str__(self) -> str:
        """A table for people, in MB."""
        height, width = self.settings.size
        most = "at most " if self.settings.n_features == "auto" else ""
        lines = [
            f"{self.n_images} images, {height} x {width}, on {self.device}, in MB",
            "",
            *_table(
                ["member", "grid", "channels", "statistics", "held out", "bank", "model"],
                [*map(_row, self.members), self._sum()],
            ),
        ]
        for name, phases in (("fit", self.fit), ("predict", self.predict)):
            peak = max(phases, key=lambda phase: phase.n_bytes)
            kept = peak.n_bytes - sum(peak.parts.values())
            parts = {**peak.parts, "kept by the process": kept}
            lines += ["", f"{name}: at the peak, {peak.name}"]
            rows = [[what, _mb(n)] for what, n in parts.items() if n]
            lines += _table(["", "MB"], [*rows, ["together", _mb(peak.n_bytes)]])
        if self.n_strips > 1:
            lines += [
                "",
                f"Gaussians are fitted in {self.n_strips} strips, for want of memory: the images are "
                f"gone over {self.n_strips + 2} times",
            ]
        free = "not known" if self.free is None else devices.shown_size(self.free)
        verdict = "fits" if self.fits else "does not fit"
        lines += [
            "",
            f"fit {devices.shown_size(self.fit_peak)}, predict "
            f"{devices.shown_size(self.predict_peak)}, model {most}"
            f"{devices.shown_size(self.model)}; free on {self.device}: {free}: {verdict}",
        ]
        return "\n".join(lines)

    def _sum(self) -> list[str]:
        columns = ([getattr(m, name) for m in self.members] for name in _COLUMNS)
        return ["together", "", "", *(_mb(sum(column)) for column in columns)]


_COLUMNS: Final = ("statistics", "held_out", "bank", "model")


def _row(plan: MemberPlan) -> list[str]:
    member = plan.member
    kinds = {"Gaussians": member.gaussian, "nominal set": member.nominal_set}
    kind = " and ".join(name for name, there in kinds.items() if there)
    levels = ", ".join(map(str, member.levels))
    kept = "" if plan.n_features is None else f" to {plan.n_features}"
    return [
        f"{kind} of {levels}" + (f" of backbone {member.network}" if member.network else ""),
        f"{plan.grid[0]} x {plan.grid[1]}",
        f"{plan.channels}{kept}",
        *(_mb(getattr(plan, name)) for name in _COLUMNS),
    ]


def _mb(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:.1f}" if n_bytes else "–"


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    """The first column to the left, the others to the right."""
    table = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]
