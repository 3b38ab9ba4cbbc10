"""How much memory of the machine a process can still have: what the system says, and its cgroups."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

__all__ = ["free_memory"]

_MEMINFO = Path("/proc/meminfo")
_CGROUPS_OF_PROCESS = Path("/proc/self/cgroup")
_CGROUPS = Path("/sys/fs/cgroup")


def free_memory() -> int | None:
    """Bytes, or None where the system does not say; the least of the machine and of each limit above.

    Memory that holds copies of files counts as free, since the system lets go of it: of the machine as
    the kernel estimates it, of a cgroup what has not been used lately.
    """
    if not _MEMINFO.exists():
        return None
    found = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
    of_machine = sum(1024 * int(found[key].split()[0]) for key in ("MemAvailable", "SwapFree"))
    return max(0, min([of_machine, *_of_cgroups()]))


def _of_cgroups() -> Iterator[int]:
    """What each limit leaves: of the process's cgroup, and of those that this one is part of."""
    if not _CGROUPS_OF_PROCESS.exists():
        return
    for line in _CGROUPS_OF_PROCESS.read_text().splitlines():
        _, controllers, name = line.split(":", 2)
        if controllers == "":  # version 2
            root, files = _CGROUPS, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root = _CGROUPS / "memory"
            files = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        inside = PurePosixPath(name).relative_to("/")
        for one in (inside, *inside.parents):  # a container sees its own as the root
            left = _left(root / one, *files)
            if left is not None:
                yield left


def _left(folder: Path, limit: str, used: str, unused: str) -> int | None:
    """None where there is no limit, or no such cgroup in sight."""
    try:
        most = (folder / limit).read_text().strip()
        now = int((folder / used).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except OSError:
        return None
    return None if most == "max" else int(most) - now + int(stat.get(unused, 0))
