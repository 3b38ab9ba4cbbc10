"""Which GPUs the machine code and the PTX of a build can run on."""

from __future__ import annotations

import re

__all__ = ["covers"]

_NAME = re.compile(r"(\d+)(\d)([af]?)(-real|-virtual)?")


def covers(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether a build has code for a compute capability.

    Machine code runs on its own major version from its minor version on, PTX on all that is not older.
    Of ``90a`` both run on 9.0 alone, of ``100f`` on its major version.

    Parameters
    ----------
    architectures : as CMake takes them, ``"75-real,90,120-virtual"``; without a suffix both are built
    capability : (major, minor) of a GPU

    Returns
    -------
    True as well where an architecture has a name that is not known here, such as ``native``.
    """
    return any(_runs(name, capability) for name in architectures.split(","))


def _runs(architecture: str, capability: tuple[int, int]) -> bool:
    match = _NAME.fullmatch(architecture)
    if match is None:
        return True
    built, kind, only = (int(match[1]), int(match[2])), match[3], match[4]
    if kind == "a":
        return capability == built
    same_major = capability[0] == built[0] and capability >= built
    if kind == "f" or only == "-real":
        return same_major
    return capability >= built
