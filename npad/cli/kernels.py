"""What `npad check` does and shows."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

import torch

from npad.environment import info
from npad.ops import _cuda, _extension, trust
from npad.ops.trust.findings import Finding

__all__ = ["check_kernels", "print_findings", "print_json", "wrong"]

HEADER = ("op", "error_over_bound", "milliseconds", "of_bandwidth", "verdict")


def check_kernels(device: torch.device) -> list[Finding]:
    """Check every kernel of a device, in child processes; of a GPU, the verdict is kept.

    Raises
    ------
    ValueError
        No kernels are made for devices of this kind.
    RuntimeError
        The reference runs there in any case, or the check could not be made.
    """
    if device.type not in ("cpu", "cuda"):
        raise ValueError(
            f"device='{device}' has no kernels that could be checked: the PyTorch reference runs "
            "there; give a CPU or a GPU of NVIDIA"
        )
    if not (_cuda.registered if device.type == "cuda" else _extension.core):
        raise RuntimeError(
            f"npad: the PyTorch reference runs on {device}, since this build has no kernels for it or "
            "they need a newer driver: there is nothing to check"
        )
    return trust.check(device)


def wrong(findings: Sequence[Finding]) -> list[str]:
    """Names of the ops whose kernels are wrong."""
    return [finding.op for finding in findings if finding.fault is not None]


def print_findings(device: torch.device, findings: Sequence[Finding]) -> None:
    """Print a table on a terminal, else tab-separated columns under the names used in the JSON."""
    rows = [list(HEADER)]
    for found in findings:
        figures = (found.error_over_bound, found.milliseconds, found.of_bandwidth)
        rows.append([found.op, *map(_cell, figures), found.fault or "right"])
    if sys.stdout.isatty():
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            cells = (f"{cell:{n}}" for cell, n in zip(row, widths, strict=True))
            print("  ".join(cells).rstrip())
    else:
        csv.writer(sys.stdout, delimiter="\t", lineterminator="\n").writerows(rows)
    print(f"{device}: {_verdict(findings)}")


def _cell(figure: float | None) -> str:
    return "–" if figure is None else f"{figure:.3g}"


def _verdict(findings: Sequence[Finding]) -> str:
    names = wrong(findings)
    return f"wrong: {', '.join(names)}" if names else "right"


def print_json(device: torch.device, findings: Sequence[Finding]) -> None:
    """Print what was found, and what `npad info` says, for a report."""
    found = {
        "device": str(device),
        "verdict": "wrong" if wrong(findings) else "right",
        "ops": [asdict(finding) for finding in findings],
        "info": info(),
    }
    print(json.dumps(found, indent=1))
