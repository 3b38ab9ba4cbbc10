"""Free memory: the least of what the machine has and of what each cgroup around the process leaves."""

from __future__ import annotations

from pathlib import Path

import pytest

from npad import free_memory

MEMINFO = """MemTotal:       20000 kB
MemFree:          100 kB
MemAvailable:    9000 kB
SwapTotal:       2000 kB
SwapFree:        1000 kB
"""
OF_MACHINE = 10_000 * 1024
LIMITS = {
    "v2": ("memory.max", "memory.current", "inactive_file"),
    "v1": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what a machine of 10 MB says; cgroups are made by the tests."""
    (tmp_path / "meminfo").write_text(MEMINFO)
    monkeypatch.setattr(free_memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(free_memory, "_CGROUPS_OF_PROCESS", tmp_path / "cgroup")
    monkeypatch.setattr(free_memory, "_CGROUPS", tmp_path / "fs")
    return tmp_path


def limit(folder: Path, version: str, most: str, used: int, unused: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = LIMITS[version]
    (folder / names[0]).write_text(f"{most}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {unused}\nfile 9\n")


def test_without_cgroups_it_is_the_machine(machine: Path) -> None:
    assert free_memory.free_memory() == OF_MACHINE
    (machine / "meminfo").unlink()
    assert free_memory.free_memory() is None


@pytest.mark.parametrize(
    ("version", "line", "root"), [("v2", "0::", ""), ("v1", "4:cpu,memory:", "memory")]
)
def test_the_least_limit_counts(machine: Path, version: str, line: str, root: str) -> None:
    (machine / "cgroup").write_text(f"9:cpuset:/other\n{line}/jobs/one\n")
    top = machine / "fs" / root
    assert free_memory.free_memory() == OF_MACHINE  # no cgroup is in sight
    limit(top / "jobs" / "one", version, "6000", 5000, 300)
    assert free_memory.free_memory() == 1300
    limit(top / "jobs", version, "9000", 8500, 100)
    assert free_memory.free_memory() == 600
    limit(top, version, "1000", 2000, 0)  # the root, as a container sees its own
    assert free_memory.free_memory() == 0


def test_no_limit_is_none(machine: Path) -> None:
    (machine / "cgroup").write_text("0::/\n")
    limit(machine / "fs", "v2", "max", 5000, 0)
    assert free_memory.free_memory() == OF_MACHINE
    (machine / "cgroup").write_text("4:memory:/\n")
    limit(machine / "fs" / "memory", "v1", str(2**63 - 4096), 5000, 0)
    assert free_memory.free_memory() == OF_MACHINE
