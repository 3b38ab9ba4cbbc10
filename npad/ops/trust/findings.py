"""What a check has found of an op, and the lines of JSON in which a child process tells it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Finding", "Line", "line_of", "read_line"]

Line = Mapping[str, Any]


@dataclass(frozen=True)
class Finding:
    """What was found of one op.

    Attributes
    ----------
    op : its name
    fault : what is wrong; None where the kernel is right
    error_over_bound : the largest error as a share of what is allowed, None where there is no result
    milliseconds : median of the large case, None where it was not timed
    of_bandwidth : share of the bandwidth of a copy, at which it moves its arguments and results
    """

    op: str
    fault: str | None
    error_over_bound: float | None = None
    milliseconds: float | None = None
    of_bandwidth: float | None = None


def line_of(what: str | Finding) -> str:
    """The line that says that an op is begun, or what was found of it."""
    told = {"begun": what} if isinstance(what, str) else {"found": asdict(what)}
    return json.dumps(told)


def read_line(line: str) -> str | Finding | None:
    """What a line says; None of one that something else has printed."""
    try:
        told = json.loads(line)
        return str(told["begun"]) if "begun" in told else Finding(**told["found"])
    except (ValueError, TypeError, KeyError):
        return None
