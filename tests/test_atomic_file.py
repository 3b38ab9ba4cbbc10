"""Files appear whole or not at all: full disks, kills, interrupts, permissions, links."""

import errno
import os
import resource
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

from npad import atomic_file
from npad.atomic_file import naming, replacing


def write(path, content):
    with replacing(path) as file:
        file.write(content)


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def test_new_file_and_replacement(tmp_path):
    path = tmp_path / "a.npad"
    write(path, b"one")
    assert path.read_bytes() == b"one"
    write(str(path), b"two")
    assert path.read_bytes() == b"two"
    assert names(tmp_path) == ["a.npad"]


def test_relative_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("a.npad", b"one")
    assert (tmp_path / "a.npad").read_bytes() == b"one"


@contextmanager
def umask(mask):
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_mode_of_a_new_file_follows_the_umask(tmp_path, mask, mode):
    with umask(mask):
        write(tmp_path / "a.npad", b"one")
        (tmp_path / "ordinary").touch()
    assert (tmp_path / "a.npad").stat().st_mode == (tmp_path / "ordinary").stat().st_mode
    assert (tmp_path / "a.npad").stat().st_mode & 0o777 == mode


def test_mode_of_a_replaced_file_stays(tmp_path):
    path = tmp_path / "a.npad"
    path.write_bytes(b"one")
    path.chmod(0o600)
    with umask(0o022):
        write(path, b"two")
    assert path.stat().st_mode & 0o777 == 0o600


def test_link_stays_and_its_target_is_replaced(tmp_path):
    (tmp_path / "store").mkdir()
    real = tmp_path / "store" / "v1.npad"
    real.write_bytes(b"one")
    link = tmp_path / "current.npad"
    link.symlink_to(Path("store") / "v1.npad")
    write(link, b"two")
    assert link.is_symlink()
    assert real.read_bytes() == b"two"
    assert not real.is_symlink()
    assert names(tmp_path / "store") == ["v1.npad"]


def test_dangling_link_gets_its_target(tmp_path):
    link = tmp_path / "current.npad"
    link.symlink_to("v1.npad")
    write(link, b"one")
    assert link.is_symlink()
    assert (tmp_path / "v1.npad").read_bytes() == b"one"


def write_half(path, error):
    with replacing(path) as file:
        file.write(b"half")
        raise error


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, MemoryError])
def test_exception_while_writing_keeps_the_old_file(tmp_path, error):
    path = tmp_path / "a.npad"
    write(path, b"one")
    with pytest.raises(error):
        write_half(path, error)
    assert path.read_bytes() == b"one"
    assert names(tmp_path) == ["a.npad"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_interrupt_at_the_last_steps_keeps_the_old_file(tmp_path, monkeypatch, call):
    path = tmp_path / "a.npad"
    write(path, b"one")

    def interrupt(*_):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(*{"fsync": (os, "fsync"), "replace": (Path, "replace")}[call], interrupt)
    with pytest.raises(KeyboardInterrupt):
        write(path, b"two")
    assert path.read_bytes() == b"one"
    assert names(tmp_path) == ["a.npad"]


@contextmanager
def largest_file(n_bytes):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.npad"
    write(path, b"one")
    with largest_file(50_000), pytest.raises(OSError, match="File too large") as caught:
        write(path, bytes(100_000))
    assert caught.value.filename == str(path)
    assert path.read_bytes() == b"one"
    assert names(tmp_path) == ["a.npad"]


def test_disk_that_is_found_full_when_flushed_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.npad"
    write(path, b"one")

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        write(path, b"two")
    assert caught.value.filename == str(path)
    assert path.read_bytes() == b"one"
    assert names(tmp_path) == ["a.npad"]


def test_flushes_the_file_then_renames_then_flushes_the_folder(tmp_path, monkeypatch):
    path = tmp_path / "a.npad"
    steps = []
    fsync, replace = os.fsync, Path.replace

    def record_fsync(descriptor):
        steps.append(Path(f"/proc/self/fd/{descriptor}").resolve())
        fsync(descriptor)

    def record_replace(source, target):
        assert source.read_bytes() == b"one"
        steps.append("rename")
        return replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "replace", record_replace)
    write(path, b"one")
    assert [step if step == "rename" else step.parent for step in steps] == [
        tmp_path,
        "rename",
        tmp_path.parent,
    ]


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        write(tmp_path / "missing" / "a.npad", b"one")
    assert caught.value.filename == str(tmp_path / "missing" / "a.npad")


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_folder_and_device_are_not_replaced(tmp_path, make):
    path = tmp_path / "a.npad"
    make(path)
    kind = path.stat().st_mode
    with pytest.raises(OSError, match="not a file"):
        write(path, b"one")
    assert path.stat().st_mode == kind
    assert names(tmp_path) == ["a.npad"]


@contextmanager
def ordinary_user(folder):
    """Without root's right to write anywhere."""
    if os.geteuid() != 0:
        yield
        return
    parents = [p for p in folder.parents if p.stat().st_uid == 0 and not p.stat().st_mode & 0o001]
    modes = [p.stat().st_mode for p in parents]
    for parent in parents:
        parent.chmod(0o711)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
        for parent, mode in zip(parents, modes, strict=True):
            parent.chmod(mode)


@pytest.mark.parametrize("read_only", ["file", "folder"])
def test_no_permission(tmp_path, read_only):
    folder = tmp_path / "models"
    folder.mkdir()
    path = folder / "a.npad"
    path.write_bytes(b"one")
    path.chmod(0o444 if read_only == "file" else 0o666)
    folder.chmod(0o555 if read_only == "folder" else 0o777)
    with ordinary_user(folder), pytest.raises(PermissionError) as caught:
        write(path, b"two")
    assert caught.value.filename == str(path)
    folder.chmod(0o777)
    assert path.read_bytes() == b"one"
    assert names(folder) == ["a.npad"]


def test_rename_that_fails_names_the_file(tmp_path, monkeypatch):
    def refuse(source, target):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), source, None, target)

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(PermissionError, match=r"not permitted: '[^']*/a\.npad'$"):
        write(tmp_path / "a.npad", b"one")


def copy(source, target):
    with replacing(target) as file:
        file.write(source.read_bytes())


def test_an_error_about_another_file_keeps_its_name(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        copy(tmp_path / "photo.png", tmp_path / "a.npad")
    assert Path(caught.value.filename).name == "photo.png"


@pytest.mark.parametrize("named", [None, 5, b"/x/.npad-1.tmp", Path("/x/.npad-1.tmp")])
def test_naming(named):
    with (
        pytest.raises(OSError, match=r"No space left on device: 'out/a\.csv'$"),
        naming("out/a.csv"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), named)


def test_naming_leaves_what_has_no_number(tmp_path):
    """Pillow's "cannot write mode" is one: with a file name its words would be lost."""
    with pytest.raises(OSError, match=r"^cannot write mode F as PNG$"), naming(tmp_path / "a.png"):
        raise OSError("cannot write mode F as PNG")


def test_leftover_of_a_killed_writer_is_removed_by_the_next(tmp_path):
    path = tmp_path / "a.npad"
    write(path, b"one")
    script = (
        "import importlib.util, os, signal, sys\n"
        "spec = importlib.util.spec_from_file_location('atomic_file', sys.argv[1])\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "with module.replacing(sys.argv[2]) as file:\n"
        "    file.write(bytes(100_000))\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    command = [sys.executable, "-c", script, atomic_file.__file__, str(path)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert path.read_bytes() == b"one"
    (leftover,) = set(names(tmp_path)) - {"a.npad"}
    assert leftover.startswith(".")
    assert leftover.endswith(".tmp")
    write(tmp_path / "b.npad", b"two")
    assert names(tmp_path) == ["a.npad", "b.npad"]


def test_writers_do_not_take_each_others_files_for_leftovers(tmp_path):
    failures = []

    def save_often(index):
        try:
            for turn in range(50):
                write(tmp_path / f"{index % 2}.npad", bytes([index]) * (1000 + turn))
        except OSError as error:
            failures.append(error)

    threads = [threading.Thread(target=save_often, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert names(tmp_path) == ["0.npad", "1.npad"]
    for path in tmp_path.iterdir():
        content = path.read_bytes()
        assert len(content) == 1049
        assert len(set(content)) == 1


def test_a_name_that_was_taken_anew_is_no_leftover(tmp_path, monkeypatch):
    """Another writer removes the leftover, and its owner opens the name again, before the lock."""
    leftover = tmp_path / ".npad-0.tmp"
    leftover.touch()

    def taken_anew(file, operation):
        leftover.unlink()
        leftover.write_bytes(b"new")

    monkeypatch.setattr(atomic_file.fcntl, "flock", taken_anew)
    atomic_file.remove_leftovers(tmp_path)
    assert leftover.read_bytes() == b"new"


def test_one_of_many_files_waits_for_nothing(tmp_path, monkeypatch):
    """Nor does it look through its folder, which would take longer with every file."""
    monkeypatch.setattr(os, "fsync", None)
    monkeypatch.setattr(Path, "glob", None)
    with replacing(tmp_path / "a", one_of_many=True) as file:
        file.write(b"whole")
    assert (tmp_path / "a").read_bytes() == b"whole"
    assert names(tmp_path) == ["a"]
