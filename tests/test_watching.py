"""`npad predict --watch`: what appears in a folder is scored once, whatever happens meanwhile."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import npad_child
import numpy as np
import pytest
from command_line import SMALL, disk_of, fail, npad, succeed
from image_files import smooth_pixels
from npad_child import Child
from PIL import Image as Pillow

from npad import NPad
from npad.calibration import Calibration, DriftMonitor
from npad.cli import arrivals, watching
from npad.cli.arrivals import Arrivals, Image
from npad.cli.program import UsageError
from npad.cli.score_tables import LiveTables
from npad.cli.watch_state import STATE, WatchState
from npad.cli.watching import nominal_colors
from npad.evaluation.overlay import draw_overlay
from npad.images import read_image

QUICK = ("--watch", "--every", "0.05", "--until-idle", "0.2", "--patience", "0.3", "--threads", "1")


def pixels(seed: int, brighter: float = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, 8, (40, 56, 3))
    return (smooth_pixels(40, 56) * 0.5 + 40 + noise + brighter).clip(0, 255).astype(np.uint8)


def save(path: Path, seed: int, brighter: float = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Pillow.fromarray(pixels(seed, brighter)).save(path)
    return path


def line(folder: Path, seeds: range, brighter: float = 0) -> Path:
    """Images in the order in which a camera took them, a second apart."""
    for i in seeds:
        path = save(folder / f"{i:04}.png", i, brighter)
        os.utime(path, ns=(0, 1_700_000_000_000_000_000 + i * 1_000_000_000))
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of models: fitted, calibrated, calibrated again, another, and one with groups."""
    root = tmp_path_factory.mktemp("models")
    line(root / "train", range(8))
    line(root / "other", range(50, 58))
    line(root / "left", range(100, 140))
    line(root / "right", range(200, 225), brighter=20)
    rate = "--false-alarm-rate", "0.1"
    succeed("fit", root / "train", "-o", root / "fitted", *SMALL)
    succeed("calibrate", root / "fitted", root / "left", "-o", root / "calibrated", *rate)
    shutil.copytree(root / "left", root / "fewer")
    (root / "fewer/0100.png").unlink()
    succeed("calibrate", root / "fitted", root / "fewer", "-o", root / "again", *rate)
    succeed("fit", root / "other", "-o", root / "another", *SMALL)
    succeed("calibrate", root / "another", root / "left", "-o", root / "another", *rate)
    both = root / "left", root / "right", "--group-by-folder"
    succeed("calibrate", root / "fitted", *both, "-o", root / "grouped", *rate)
    return root


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in (out / "scores.jsonl").read_text().splitlines()]


def watch(model: Path, *args: object) -> Any:
    return succeed("predict", model, *args, *QUICK)


def names(rows: list[dict[str, Any]]) -> list[str]:
    return [Path(row["path"]).name for row in rows]


def snapshot(folder: Path) -> dict[str, Any]:
    return {
        str(path): (path.stat().st_mtime_ns, path.stat().st_ino, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


# --- what is written ---


def test_scores_are_those_of_predict_and_the_monitors_are_those_of_the_scores(
    models: Path, tmp_path: Path
) -> None:
    camera = line(tmp_path / "camera", range(300, 325))
    line(camera / "late", range(325, 350), brighter=25)
    before = snapshot(camera)
    out = tmp_path / "out"
    said = watch(models / "calibrated", camera, "-o", out, "--maps", "--masks")
    assert f"{camera}: watched; Ctrl-C ends it" in said.out
    assert "scores.csv: 50 images, " in said.out
    assert snapshot(camera) == before
    rows = rows_of(out)
    model = NPad.load(models / "calibrated")
    expected = model.predict([row["path"] for row in rows])
    assert names(rows) == [f"{i:04}.png" for i in range(300, 350)]
    np.testing.assert_allclose([row["score"] for row in rows], expected.scores, rtol=1e-6)
    monitor = DriftMonitor(Calibration(model.calibration_.scores))
    for row, regions in zip(rows, expected.regions, strict=True):
        assert row["drift_raised"] == monitor.update([row["score"]])
        assert row["drift"] == monitor.martingale
        assert len(row["regions"]) == len(regions)
        assert (out / row["overlay"]).is_file()
        assert (out / row["map"]).is_file()
        assert (out / row["mask"]).is_file()
    assert 25 < monitor.raised_at < 50
    assert said.err.count("npad: warning: drift: at image") == 1
    assert f"at image {monitor.raised_at}, {rows[monitor.raised_at - 1]['path']}, " in said.err
    with (out / "scores.csv").open() as file:
        for cells, row in zip(csv.DictReader(file), rows, strict=True):
            assert float(cells["drift"]) == row["drift"]
            assert int(cells["drift_raised"]) == row["drift_raised"]
            assert int(cells["n_regions"]) == len(row["regions"])
            assert cells["path"] == row["path"]
    with (out / "regions.csv").open() as file:
        assert len(list(csv.DictReader(file))) == sum(len(row["regions"]) for row in rows)
    state = json.loads((out / STATE).read_text())
    assert state["monitors"] == [{"group": None, **monitor.state()}]
    again = watch(models / "calibrated", camera, "-o", out, "--maps", "--masks")
    assert "scores.csv: 0 images" in again.out
    assert f"npad: warning: drift: at image {monitor.raised_at} the scores" in again.err
    assert rows_of(out) == rows


def test_a_model_that_is_not_calibrated_gives_scores_alone(models: Path, tmp_path: Path) -> None:
    camera = line(tmp_path / "camera", range(3))
    out = tmp_path / "out"
    said = watch(models / "fitted", camera, "-o", out, "--color-range", "0,5")
    assert "npad: note: the model is not calibrated" in said.err
    assert (out / "scores.csv").read_text().startswith("path,score\n")
    assert set(rows_of(out)[0]) == {"path", "score", "size", "overlay", "bytes", "modified"}
    assert not (out / "regions.csv").exists()
    assert watch(models / "fitted", camera, "-o", out, "--no-overlays", "-q").err == ""
    assert len(rows_of(out)) == 3


def test_masks_are_no_images(tmp_path: Path) -> None:
    folders = [line(tmp_path / "train", range(6)), line(tmp_path / "camera", range(6, 9))]
    for image in [image for folder in folders for image in folder.iterdir()]:
        with Pillow.open(image) as opened:
            Pillow.new("L", opened.size, 255).save(image.with_name(f"{image.stem}_roi.png"))
    model, out = tmp_path / "m", tmp_path / "out"
    succeed("fit", folders[0], "-o", model, *SMALL, "--rois", "{}_roi.png")
    watch(model, folders[1], "-o", out, "--no-overlays")
    found = names(rows_of(out))
    assert len(found) == 3
    assert not any("roi" in name for name in found)


def test_each_group_has_a_monitor(models: Path, tmp_path: Path) -> None:
    left = line(tmp_path / "left", range(300, 320))
    right = line(tmp_path / "right", range(400, 430), brighter=45)
    out = tmp_path / "out"
    said = watch(models / "grouped", left, right, "-o", out, "--group-by-folder")
    rows = rows_of(out)
    assert [row["group"] for row in rows] == ["left"] * 20 + ["right"] * 30
    nominal = NPad.load(models / "grouped").calibration_
    for group in ("left", "right"):
        own = nominal.scores[[one == group for one in nominal.groups]]
        monitor = DriftMonitor(Calibration(own))
        monitor.update([row["score"] for row in rows if row["group"] == group])
        assert [row for row in rows if row["group"] == group][-1]["drift"] == monitor.martingale
        assert (monitor.raised_at is not None) == (group == "right")
    assert said.err.count("of group 'right'") == 1
    assert "of group 'left'" not in said.err
    line(left, range(320, 322))
    watch(models / "grouped", left, right, "-o", out, "--group-by-folder")
    assert [row["drift_raised"] for row in rows_of(out)[-2:]] == [False, False]
    one = tmp_path / "one"
    watch(models / "grouped", left, "-o", one, "--group", "left")
    assert {row["group"] for row in rows_of(one)} == {"left"}


def test_colours_without_an_end(models: Path, tmp_path: Path) -> None:
    model = NPad.load(models / "calibrated")
    low, high = nominal_colors(model)
    assert (model.calibration_.map_maxima <= low).mean() == pytest.approx(0.5, abs=0.05)
    assert (low + high) / 2 == pytest.approx(model.map_threshold_)
    grouped = NPad.load(models / "grouped")
    assert sum(nominal_colors(grouped)) / 2 == pytest.approx(max(grouped.map_threshold_.values()))
    camera = line(tmp_path / "camera", range(1), brighter=10)
    watch(models / "calibrated", camera, "-o", tmp_path / "out")
    (map_,) = model.predict(camera).maps
    expected = draw_overlay(read_image(camera / "0000.png"), (map_ - low) / (high - low))
    drawn = np.asarray(Pillow.open(tmp_path / "out/overlays/0000.png.png"))
    outlined = (drawn == (90, 220, 255)).all(-1)
    assert np.array_equal(drawn[~outlined], expected[~outlined])


# --- what appears, and how ---


def meanwhile(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_images_that_are_written_while_it_watches(models: Path, tmp_path: Path) -> None:
    """At once, in two halves with a long pause, and one that is never finished."""
    camera = line(tmp_path / "camera", range(300, 302))
    whole = save(tmp_path / "whole.png", 7).read_bytes()

    def write() -> None:
        save(camera / "below/at-once.png", 1)
        for name in ("slow.png", "never.png"):
            with (camera / name).open("wb") as file:
                file.write(whole[: len(whole) // 2])
                file.flush()
                if name == "slow.png":
                    time.sleep(0.4)  # longer than two looks, and longer than patience less one
                    file.write(whole[len(whole) // 2 :])

    writer = meanwhile(write)
    out = tmp_path / "out"
    options = ("--every", "0.05", "--until-idle", "1", "--patience", "0.8", "--threads", "1")
    said = succeed("predict", models / "calibrated", camera, "-o", out, "--watch", *options)
    writer.join()
    assert sorted(names(rows_of(out))) == ["0300.png", "0301.png", "at-once.png", "slow.png"]
    skipped = [text for text in said.err.splitlines() if "skipped" in text]
    assert len(skipped) == 1
    assert skipped[0].startswith(f"npad: skipped: {camera / 'never.png'}: damaged or cut short")
    (camera / "never.png").write_bytes(whole)
    assert "skipped" not in watch(models / "calibrated", camera, "-o", out).err
    assert names(rows_of(out))[4:] == ["never.png"]


def test_an_image_that_is_written_anew_is_another(models: Path, tmp_path: Path) -> None:
    camera = line(tmp_path / "camera", range(300, 303))
    out = tmp_path / "out"
    run = (models / "calibrated", camera, "-o", out, "--no-overlays")
    watch(*run)
    old = (camera / "0301.png").read_bytes()
    save(camera / "0301.png", 9)
    watch(*run)
    assert names(rows_of(out)) == ["0300.png", "0301.png", "0302.png", "0301.png"]
    first, second = (row for row in rows_of(out) if row["path"].endswith("0301.png"))
    assert first["score"] != second["score"]
    assert second["bytes"] == (camera / "0301.png").stat().st_size
    assert second["modified"] == (camera / "0301.png").stat().st_mtime_ns
    (camera / "0301.png").write_bytes(old)  # as it was before, and at the time at which it was so
    os.utime(camera / "0301.png", ns=(0, first["modified"]))
    shutil.move(camera / "0300.png", tmp_path / "0300.png")
    watch(*run)
    shutil.move(tmp_path / "0300.png", camera / "0300.png")
    watch(*run)
    assert len(rows_of(out)) == 4


def test_an_image_that_changes_while_it_is_read_comes_again(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    camera = line(tmp_path / "camera", range(300, 303))
    write = watching._Run._write

    def change(run: Any, prediction: Any, *args: Any) -> None:
        monkeypatch.setattr(watching._Run, "_write", write)
        save(camera / "0301.png", 9)
        (camera / "0302.png").unlink()  # it was there: its row is written
        write(run, prediction, *args)

    monkeypatch.setattr(watching._Run, "_write", change)
    watch(models / "calibrated", camera, "-o", tmp_path / "out", "--no-overlays")
    rows = rows_of(tmp_path / "out")
    assert names(rows) == ["0300.png", "0302.png", "0301.png"]
    state = json.loads((tmp_path / "out" / STATE).read_text())
    assert state["monitors"][0]["n_seen"] == 3


@pytest.mark.filterwarnings("default")
def test_an_empty_folder_and_files_that_are_no_images(models: Path, tmp_path: Path) -> None:
    camera = tmp_path / "camera"
    camera.mkdir()
    (camera / "x.png.part").touch()
    (camera / "to-nothing.png").symlink_to(tmp_path / "absent")
    (camera / ".hidden.png").write_bytes(b"")
    said = watch(models / "calibrated", camera, "-o", camera / "out").err
    assert said.count("warning") == 1  # not at each look
    assert "1 file was left out, by suffix: 1 .part (" in said
    assert rows_of(camera / "out") == []
    line(camera, range(2))
    for _ in range(2):  # its overlays are no input
        watch(models / "calibrated", camera, "-o", camera / "out")
    assert len(rows_of(camera / "out")) == 2


def test_names_that_a_disk_may_take_for_one(models: Path, tmp_path: Path) -> None:
    camera = tmp_path / "camera"
    save(camera / "x.png", 1)
    out = tmp_path / "out"
    run = (models / "calibrated", camera, "-o", out)
    watch(*run)
    save(camera / "X.png", 2)
    save(camera / os.fsdecode(b"\xff.png"), 3)
    watch(*run)
    lower, *others = rows_of(out)
    upper, byte = sorted(others, key=lambda row: not row["path"].endswith("X.png"))
    assert lower["overlay"] == "overlays/x.png.png"
    assert re.fullmatch(r"overlays/X\.png~[0-9a-f]{8}\.png", upper["overlay"])
    assert os.fsencode(byte["path"]) == os.fsencode(camera) + b"/\xff.png"
    watch(*run)
    assert len(rows_of(out)) == 3


class Clock:
    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(arrivals, "time", found)
    return found


def test_when_an_image_is_whole_and_when_it_is_given_up(tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"12")
    found = Arrivals([tmp_path], [], patience=10)
    assert found.look() == []
    assert found.are_expected
    path.write_bytes(b"123")
    clock.now = 50
    assert found.look() == []  # it has changed
    os.utime(path, ns=(0, 5))
    assert found.look() == []
    (image,) = found.look()
    assert (image.path, image.n_bytes, image.modified) == (str(path), 3, 5)
    clock.now = 59.9
    assert not found.failed(image)
    assert found.look() == [image]
    clock.now = 60
    assert found.failed(image)
    assert found.look() == []
    assert not found.are_expected
    os.utime(path, ns=(0, 6))
    assert found.look() == []
    (image,) = found.look()
    found.done(image)
    assert found.look() == []
    os.utime(path, ns=(0, 7))
    found.look()
    (image,) = found.look()
    path.unlink()
    clock.now = 1000
    assert not found.failed(image)  # it is gone: nobody has to be told
    assert found.look() == []
    assert not found.are_expected
    assert found.present == []


def test_images_come_in_the_order_in_which_they_were_written(tmp_path: Path) -> None:
    for i, name in enumerate(("b", "c", "a", "e", "d")):
        save(tmp_path / f"{name}.png", i)
        os.utime(tmp_path / f"{name}.png", ns=(0, min(i, 3)))
    found = Arrivals([tmp_path, tmp_path], [], patience=0)
    found.look()
    assert [Path(image.path).stem for image in found.look()] == ["b", "c", "a", "d", "e"]


def test_a_share_that_is_away_for_a_while(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    share, other = tmp_path / "share", tmp_path / "other"
    for i, folder in enumerate((share, other)):
        save(folder / "a.png", i)
    done = Image.found(save(share / "done.png", 5))
    found = Arrivals([share, other], [done], patience=10)
    found.look()
    share.rename(tmp_path / "away")
    assert [image.path for image in found.look()] == [str(share / "a.png"), str(other / "a.png")]
    found.look()
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert told.startswith(f"npad: warning: {share}: the folder cannot be read: ")
    share.mkdir()  # where it is mounted
    found.look()
    share.rmdir()
    (tmp_path / "away").rename(share)
    found.look()
    assert [image.path for image in found.look()] == [str(share / "a.png"), str(other / "a.png")]
    assert capsys.readouterr().err == ""


# --- restarts ---


@pytest.fixture(scope="module")
def server() -> Iterator[subprocess.Popen[str]]:
    with npad_child.server() as process:
        yield process


def contents(out: Path) -> dict[str, Any]:
    """Of all files but locks; of the state, what does not depend on when it was written."""
    found: dict[str, Any] = {
        str(path.relative_to(out)): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file() and ".npad-" not in path.name
    }
    return found | {STATE: json.loads(found[STATE])}


def test_kills_at_any_moment_lose_and_double_nothing(
    server: subprocess.Popen[str], models: Path, tmp_path: Path
) -> None:
    """Killed again and again at a random line, until it gets to the end, is as if never killed."""
    left = line(tmp_path / "left", range(300, 306))
    right = line(tmp_path / "right", range(400, 410), brighter=45)
    before = snapshot(tmp_path)
    options = ("--group-by-folder", "--batch-size", "2", *QUICK, "--until-idle", "0")

    def run(out: Path, kill_at: int | None) -> tuple[int, str]:
        args = ("predict", models / "grouped", left, right, "-o", out, *options)
        return Child(server, args, tmp_path / f"{out.name}.txt", kill_at).wait()

    code, said = run(tmp_path / "undisturbed", None)
    assert code == 0, said
    n_lines = int(said.split()[-2])
    expected = contents(tmp_path / "undisturbed")
    assert len(expected["scores.jsonl"].splitlines()) == 16
    random = np.random.default_rng(0)
    kills = 0
    for attempt in range(40):
        share = 0.2 + attempt / 10  # at first it gets nowhere, at last to the end
        code, said = run(tmp_path / "out", int(random.integers(1, share * n_lines)))
        if code == 0:
            break
        assert code == -signal.SIGKILL, said
        kills += 1
    assert code == 0
    assert kills >= 3
    assert contents(tmp_path / "out") == expected
    after = snapshot(tmp_path)
    assert {path: after[path] for path in before} == before


def test_kills_at_random_times(server: subprocess.Popen[str], models: Path, tmp_path: Path) -> None:
    camera = line(tmp_path / "camera", range(300, 330))
    args = ("predict", models / "calibrated", camera, "--batch-size", "1", *QUICK)
    Child(server, (*args, "-o", tmp_path / "undisturbed"), tmp_path / "a.txt", None).wait()
    out, random = tmp_path / "out", np.random.default_rng(0)
    for _ in range(6):
        child = Child(server, (*args, "-o", out), tmp_path / "b.txt", None)
        time.sleep(random.uniform(0, 1))
        with suppress(ProcessLookupError):  # a fast machine has scored all by then
            os.kill(child.pid, signal.SIGKILL)
        child.wait()
    code, said = Child(server, (*args, "-o", out), tmp_path / "b.txt", None).wait()
    assert code == 0, said
    assert contents(out) == contents(tmp_path / "undisturbed")


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)], ids=["terminate", "interrupt"]
)
def test_signals_end_it_with_all_rows_written(
    number: int, code: int, server: subprocess.Popen[str], models: Path, tmp_path: Path
) -> None:
    camera = line(tmp_path / "camera", range(300, 340))
    out = tmp_path / "out"
    args = ("predict", models / "calibrated", camera, "-o", out, "--watch", "--every", "0.05")
    args += ("--batch-size", "1", "--threads", "1")
    child = Child(server, args, tmp_path / "said.txt", None)
    deadline = time.monotonic() + 60
    while not (out / "scores.jsonl").exists() or len(rows_of(out)) < 3:
        assert time.monotonic() < deadline, child.said()
        time.sleep(0.01)
    os.kill(child.pid, number)
    ended, said = child.wait()
    assert ended == code, said
    n = len(rows_of(out))
    assert f"scores.csv: {n} images, " in said
    assert ("npad: interrupted\n" in said) == (number == signal.SIGINT)
    assert "Traceback" not in said
    state = json.loads((out / STATE).read_text())
    assert state["monitors"][0]["n_seen"] == n
    assert state["tables"] == {name: (out / name).stat().st_size for name in state["tables"]}
    assert len((out / "scores.csv").read_text().splitlines()) == n + 1
    assert not (out / ".npad-lock").exists()
    watch(models / "calibrated", camera, "-o", out)
    assert names(rows_of(out)) == [f"{i:04}.png" for i in range(300, 340)]


def test_two_interrupts_end_it_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with watching._Ending() as ending:
        signal.raise_signal(signal.SIGTERM)
        ending.wait(1e9)
        assert ending.signal == signal.SIGTERM
        signal.raise_signal(signal.SIGINT)
        assert ending.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) == before
    monkeypatch.setattr(signal, "getsignal", lambda _: signal.SIG_IGN)
    with watching._Ending() as ending:  # a shell's job in the background goes on
        assert signal.SIGINT not in ending._before


@pytest.mark.parametrize(
    "torn", [b'{"path": "/x", "sco', b'{"path": "/x"}', b"\0" * 50 + b"\n", b"[1]\n", b"7"]
)
def test_what_a_cut_left_in_the_tables_is_made_whole(
    torn: bytes, models: Path, tmp_path: Path
) -> None:
    camera = line(tmp_path / "camera", range(300, 306))
    out = tmp_path / "out"
    run = (models / "calibrated", camera, "-o", out, "--no-overlays")
    watch(*run)
    expected = contents(out)
    state = expected[STATE]
    first = expected["scores.jsonl"].splitlines(keepends=True)[0]
    monitor = DriftMonitor(Calibration(NPad.load(models / "calibrated").calibration_.scores))
    monitor.update([json.loads(first)["score"]])
    old = {
        **state,
        "tables": {
            **state["tables"],
            "scores.jsonl": len(first),
            "scores.csv": 0,
            "regions.csv": 0,
        },
        "monitors": [{"group": None, **monitor.state()}],
    }
    if json.loads(first)["regions"]:
        pytest.fail("the first image should have no region")
    header = expected["scores.csv"].splitlines(keepends=True)
    old["tables"]["scores.csv"] = len(header[0] + header[1])
    old["tables"]["regions.csv"] = len(expected["regions.csv"].splitlines(keepends=True)[0])
    (out / STATE).write_text(json.dumps(old))
    with (out / "scores.jsonl").open("ab") as file:
        file.write(torn)
    with (out / "scores.csv").open("ab") as file:
        file.write(b"/camera/0306.png,1.")
    watch(*run)
    assert contents(out) == expected


def test_tables_that_have_lost_rows_are_refused(models: Path, tmp_path: Path) -> None:
    camera = line(tmp_path / "camera", range(300, 303))
    out = tmp_path / "out"
    watch(models / "calibrated", camera, "-o", out)
    for name in ("scores.csv", "scores.jsonl"):
        kept = (out / name).read_bytes()
        (out / name).write_bytes(kept[:-5])
        fail(2, "predict", models / "calibrated", camera, "-o", out, *QUICK,
             says=[out / name, "has lost rows", "--output"])  # fmt: skip
        assert (out / name).read_bytes() == kept[:-5]
        (out / name).write_bytes(kept)
    (out / "scores.jsonl").write_bytes(re.sub(b'"modified"', b'"moderated"', kept))
    fail(2, "predict", models / "calibrated", camera, "-o", out, *QUICK, says=["'modified'"])


def test_a_disk_that_is_full(models: Path, tmp_path: Path) -> None:
    camera = line(tmp_path / "camera", range(300, 320))
    out = tmp_path / "out"
    run = (models / "calibrated", camera, "-o", out, "--no-overlays", "--batch-size", "1")
    with disk_of(6000):
        fail(1, "predict", *run, *QUICK, says=[out, "the space on its disk"])
    assert 1 <= (out / "scores.jsonl").read_bytes().count(b"\n") < 20
    watch(*run)
    assert names(rows_of(out)) == [f"{i:04}.png" for i in range(300, 320)]
    watch(*run[:2], "-o", tmp_path / "undisturbed", *run[4:])
    assert contents(out) == contents(tmp_path / "undisturbed")


# --- other models, other folders ---


def test_another_model_or_calibration_is_told_by_name(models: Path, tmp_path: Path) -> None:
    camera = line(tmp_path / "camera", range(300, 320))
    line(camera, range(320, 350), brighter=45)
    out = tmp_path / "out"
    watch(models / "calibrated", camera, "-o", out)
    rows = rows_of(out)
    assert rows[-1]["drift_raised"]

    def refused(code: int, model: str, *args: object, says: list[str]) -> None:
        fail(code, "predict", models / model, *args, "-o", out, *QUICK, says=says)

    refused(2, "again", camera, says=[out, "was calibrated again since", "--new-monitor"])
    refused(2, "another", camera, says=[out, "with another model", "--new-monitor"])
    refused(2, "fitted", camera, "--no-overlays", "-q", says=["the model is not calibrated, and"])
    refused(2, "calibrated", camera, "--drift-bound", "0.1",
            says=["has --drift-bound 0.01: leave it", "--new-monitor"])  # fmt: skip
    elsewhere = line(tmp_path / "elsewhere", range(2))
    refused(2, "calibrated", elsewhere, says=[camera, "watch the same"])
    refused(2, "calibrated", camera, elsewhere, says=[camera, "watch the same"])
    assert rows_of(out) == rows
    shutil.copy(models / "calibrated", tmp_path / "renamed")
    assert rows_of(out) == rows

    copy = tmp_path / "renamed"  # what counts is what is in the file, and rates may change
    watch(copy, camera, "-o", out, "--false-alarm-rate", "0.2", "--drift-bound", "0.01")
    line(camera, range(350, 353))
    said = watch(models / "again", camera, "-o", out, "--new-monitor", "--drift-bound", "0.2")
    assert "drift: at image" not in said.err
    new = rows_of(out)[50:]
    assert len(new) == 3
    known = NPad.load(models / "again").calibration_.scores
    monitor = DriftMonitor(Calibration(known), 0.2)
    for row in new:
        monitor.update([row["score"]])
        assert (row["drift"], row["drift_raised"]) == (monitor.martingale, False)
    assert json.loads((out / STATE).read_text())["monitors"] == [{"group": None, **monitor.state()}]
    watch(models / "again", camera, "-o", out)  # goes on, with its own bound
    assert json.loads((out / STATE).read_text())["false_alarm_bound"] == 0.2
    assert len(rows_of(out)) == 53


def test_rows_that_no_state_knows_are_not_those_of_a_new_monitor(
    models: Path, tmp_path: Path
) -> None:
    camera = line(tmp_path / "camera", range(300, 310))
    out = tmp_path / "out"
    run = (models / "calibrated", camera, "-o", out, "--no-overlays")
    watch(*run)
    expected = contents(out)
    state = expected[STATE]
    (out / STATE).write_text(json.dumps(state | {"tables": {}, "monitors": []}))
    watch(*run, "--new-monitor")
    assert contents(out) == expected | {STATE: state | {"monitors": []}}


def test_a_folder_of_another_run_is_refused(models: Path, tmp_path: Path) -> None:
    camera = line(tmp_path / "camera", range(2))
    out = tmp_path / "out"
    succeed("predict", models / "fitted", camera, "-o", out)
    before = snapshot(out)
    fail(2, "predict", models / "fitted", camera, "-o", out, "-q", "--no-overlays", *QUICK,
         says=[out / "scores.csv", "did not watch", "--output"])  # fmt: skip
    assert snapshot(out) == before


NO_STATES: dict[str, Any] = {
    "not json": b"{",
    "not text": b"\xff\xfe",
    "a list": [],
    "format is not 1": {"format": 2},
    "'model' is missing": {"model": None},
    "folders is 3": {"folders": 3},
    "false_alarm_bound is 'x'": {"false_alarm_bound": "x"},
    "tables has -1": {"tables": {"scores.csv": -1}},
    "n_seen must be": {"monitors": [{"n_seen": 10**6}]},
    "a monitor's group is": {"monitors": [{"group": 0.5}]},
    "state must be a dict": {"monitors": [3]},
}


@pytest.mark.parametrize("case", NO_STATES)
def test_states_that_are_none_are_refused(case: str, models: Path, tmp_path: Path) -> None:
    camera = line(tmp_path / "camera", range(300, 302))
    out = tmp_path / "out"
    watch(models / "calibrated", camera, "-o", out, "--no-overlays")
    state = json.loads((out / STATE).read_text())
    change = NO_STATES[case]
    says = [out / STATE, "--output"]
    if isinstance(change, bytes):
        (out / STATE).write_bytes(change)
    else:
        says.append("its format is not 1" if case == "a list" else case)
        if isinstance(change, dict):
            monitors = change.get("monitors")
            if monitors and isinstance(monitors[0], dict):
                change = {"monitors": [state["monitors"][0] | monitors[0]]}
            state = {key: value for key, value in (state | change).items() if value is not None}
        else:
            state = change
        (out / STATE).write_text(json.dumps(state))
    before = snapshot(out)
    fail(2, "predict", models / "calibrated", camera, "-o", out, *QUICK, says=says)
    assert snapshot(out) == before


def test_the_state_comes_back(tmp_path: Path) -> None:
    assert WatchState.load(tmp_path) is None
    state = WatchState(["/camera"], "a", None, None, {"scores.csv": 5})
    state.save(tmp_path)
    assert WatchState.load(tmp_path) == state
    with (
        pytest.raises(UsageError, match="has lost rows"),
        LiveTables(tmp_path, decided=False, sizes=state.tables),
    ):
        pass


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (("{model}", "{camera}", "--every", "1"), 2, ["--every is of use with --watch only"]),
        (("{model}", "{camera}", "--until-idle", "0"), 2, ["--until-idle is of use with --watch"]),
        (("{model}", "{camera}", "--patience", "0"), 2, ["--patience is of use with --watch only"]),
        (("{model}", "{camera}", "--drift-bound", ".1"), 2, ["--drift-bound is of use with"]),
        (("{model}", "{camera}", "--new-monitor"), 2, ["--new-monitor is of use with --watch"]),
        (("{model}", "{camera}", "--watch", "--every", "0"), 2, ["--every", "'0'", "0.01"]),
        (("{model}", "{camera}", "--watch", "--every", "nan"), 2, ["--every", "'nan'"]),
        (("{model}", "{camera}", "--watch", "--until-idle", "x"), 2, ["--until-idle", "'x'"]),
        (("{model}", "{camera}", "--watch", "--until-idle", "inf"), 2, ["--until-idle", "'inf'"]),
        (("{model}", "{camera}", "--watch", "--patience", "-1"), 2, ["--patience", "'-1'"]),
        (("{model}", "{camera}", "--watch", "--drift-bound", "1"), 2, ["--drift-bound", "'1'"]),
        (("{model}", "{camera}", "--watch", "--drift-bound", "0"), 2, ["--drift-bound", "'0'"]),
        (("{model}", "{camera}", "--watch", "--drift-bound", "a"), 2, ["--drift-bound", "'a'"]),
        (("{model}", "{camera}/0000.png", "--watch"), 2, ["0000.png is no folder"]),
        (("{model}", "{camera}/absent", "--watch"), 2, ["absent"]),
        (("{model}", "{output}", "--watch"), 1, ["is npad's own output"]),
        (("{fitted}", "{camera}", "--watch"), 2, ["--color-range", "--no-overlays", "calibrate"]),
        (("{fitted}", "{camera}", "--watch", "--masks"), 2, ["--masks needs thresholds"]),
        (("{fitted}", "{camera}", "--watch", "--drift-bound", ".1"), 2, ["calibrated: npad"]),
        (("{fitted}", "{camera}", "--watch", "--new-monitor"), 2, ["calibrated: npad calibrate"]),
        (("{grouped}", "{camera}", "--watch"), 1, ["('left', 'right')", "--group"]),
        (("{grouped}", "{camera}", "--watch", "--group", "top"), 1, ["no group 'top'"]),
        (("{grouped}", "{camera}", "--watch", "--group-by-folder"), 1, ["no group 'camera'"]),
        (("{model}", "{camera}", "--watch", "--group", "left"), 1, ["calibrated without groups"]),
        (("{model}", "{camera}", "--watch", "--false-alarm-rate", ".001"), 1, ["needs 999"]),
    ],
)
def test_what_is_refused(
    args: tuple[str, ...], code: int, says: list[str], models: Path, tmp_path: Path
) -> None:
    camera = line(tmp_path / "camera", range(1))
    (tmp_path / "overlays").mkdir()
    (tmp_path / "overlays/.npad-output").touch()
    places = {"camera": camera, "output": tmp_path / "overlays", "model": models / "calibrated"}
    places |= {name: models / name for name in ("fitted", "grouped")}
    out = tmp_path / "out"
    given = [arg.format(**places) for arg in args]
    fail(code, "predict", *given, "-o", out, says=says)
    assert not out.exists()


# --- a line that changes ---


def test_a_ramp_of_brightness_raises_the_monitor_and_quiet_images_do_not(
    models: Path, tmp_path: Path
) -> None:
    """Half a grey level an image, of 255: within 60 images."""
    camera = line(tmp_path / "camera", range(300, 340))
    out = tmp_path / "out"
    run = (models / "calibrated", camera, "-o", out, "--no-overlays")
    assert "drift" not in watch(*run).err
    for i in range(340, 400):
        line(camera, range(i, i + 1), brighter=(i - 339) / 2)
    said = npad("predict", *run, *QUICK)
    assert "npad: warning: drift: at image" in said.err
    raised = [row["drift_raised"] for row in rows_of(out)]
    assert raised == sorted(raised)  # it stays raised
    assert 40 < raised.index(True) < 100
