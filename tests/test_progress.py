"""Progress bars: when they appear, what they say, and that they always go away."""

import functools
import os
import pty
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from npad import progress
from npad.progress import task, track

HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"
ERASE_LINE = "\x1b[2K"


class Terminal:
    """A terminal whose output is collected."""

    def __init__(self):
        self._master, self.slave = pty.openpty()
        self._output = b""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self):
        while True:
            try:
                piece = os.read(self._master, 4096)
            except OSError:  # the other end was closed
                piece = b""
            if not piece:
                return
            self._output += piece

    @property
    def text(self):
        return self._output.decode()

    def wait_for(self, text, seconds=10):
        end = time.monotonic() + seconds
        while text not in self.text:
            assert time.monotonic() < end, f"{text!r} did not appear in {self.text!r}"
            time.sleep(0.01)

    def close(self):
        """Close it and return all that was shown."""
        self._reader.join(timeout=10)
        os.close(self._master)
        return self.text


@pytest.fixture
def terminal(monkeypatch):
    """A terminal of 160 columns, on which bars appear at once."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(progress, "DELAY", 0.0)
    terminal = Terminal()
    yield terminal
    terminal.close()


def on_terminal(test):
    """Run a test with standard error on its terminal; pytest's capture undoes what fixtures set."""

    @functools.wraps(test)
    def run(terminal, **fixtures):
        with os.fdopen(terminal.slave, "w") as stream, pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stderr", stream)
            try:
                test(terminal=terminal, **fixtures)
            finally:
                progress._display.stop()

    return run


def assert_erased(terminal):
    assert progress._display._bars is None
    sys.stderr.write("end of the bars")
    sys.stderr.flush()
    terminal.wait_for("end of the bars")
    assert terminal.text.count(HIDE_CURSOR) == terminal.text.count(SHOW_CURSOR) > 0


# What it yields


def test_track_yields_the_items_one_by_one():
    taken = []

    def items():
        for item in range(3):
            taken.append(item)
            yield item

    iterator = track(items(), "fit")
    assert next(iterator) == 0
    assert taken == [0]
    assert list(iterator) == [1, 2]


@pytest.mark.parametrize("enabled", [None, True, False])
def test_without_a_terminal_nothing_is_printed(monkeypatch, capfd, enabled):
    monkeypatch.setattr(progress, "DELAY", 0.0)
    assert list(track([1, 2], "fit", enabled=enabled)) == [1, 2]
    with task("fit", 2, enabled) as advance:
        advance(2)
    assert capfd.readouterr() == ("", "")


def test_closed_standard_error_is_no_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    assert list(track([1, 2], "fit")) == [1, 2]


@on_terminal
def test_quiet_prints_nothing_on_a_terminal(terminal):
    assert list(track([1, 2], "fit", enabled=False)) == [1, 2]
    assert terminal.text == ""


@on_terminal
def test_short_work_prints_nothing(terminal, monkeypatch):
    monkeypatch.setattr(progress, "DELAY", 2.0)
    assert list(track([1, 2], "fit")) == [1, 2]
    assert terminal.text == ""


@on_terminal
def test_bar_appears_after_the_delay(terminal, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(progress, "DELAY", 2.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    with task("fit", 10) as advance:
        clock[0] += 1.99
        advance()
        assert progress._display._bars is None
        clock[0] += 0.02
        advance()
        assert progress._display._bars is not None
    assert_erased(terminal)


# What it says


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((30, 120, 10.0, "images"), "30/120 images, 3/s, 0:00:30 left"),
        ((30, None, 10.0, "images"), "30 images, 3/s"),
        ((1500.4, 1e6, 3.0, "MB"), "1,500/1,000,000 MB, 500/s, 0:33:16 left"),
        ((1, 86_401, 1.0, ""), "1/86,401, 1/s, 1 day, 0:00:00 left"),
        ((0, 10, 5.0, ""), "0/10, 0/s"),
        ((5, 10, 0.0, ""), "5/10, 0/s"),
        ((12, 10, 6.0, ""), "12/10, 2/s, 0:00:00 left"),
    ],
)
def test_pace(arguments, expected):
    assert progress._pace(*arguments) == expected


@on_terminal
def test_bar_shows_description_count_rate_and_time_left(terminal):
    with task("Fitting [bottle]", 40, unit="images") as advance:
        advance(10)
        terminal.wait_for("Fitting [bottle]")
        terminal.wait_for("10/40 images, ")
        terminal.wait_for("/s, 0:00:0")
        terminal.wait_for(" left")
    assert_erased(terminal)


@on_terminal
def test_total_is_the_length_where_it_is_known(terminal):
    for item in track(["a", "b", "c"], "fit"):
        if item == "b":
            terminal.wait_for("1/3")
    for item in track(iter(["d", "e"]), "predict"):
        if item == "e":
            terminal.wait_for("1, ")
    assert_erased(terminal)


@on_terminal
def test_standard_output_is_left_alone(terminal, capsys):
    with task("fit", 2) as advance:
        advance()
        terminal.wait_for("1/2")
        print("score,0.5")
    assert capsys.readouterr().out == "score,0.5\n"
    assert "score" not in terminal.text


@on_terminal
def test_warnings_are_printed_above_the_bar(terminal):
    with task("fit", 2) as advance:
        advance()
        terminal.wait_for("1/2")
        print("a warning", file=sys.stderr)
        terminal.wait_for("a warning")
    assert_erased(terminal)


# How it ends


def fail_in_a_task(error):
    with task("fails", 3) as advance:
        advance()
        raise error


def fail_in_a_loop(error):
    for item in track(range(3), "fails"):
        if item == 2:
            raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("work", [fail_in_a_task, fail_in_a_loop])
@on_terminal
def test_bar_is_erased_before_an_error_is_reported(terminal, work, error):
    stderr = sys.stderr
    with pytest.raises(error) as caught:
        work(error)
    assert_erased(terminal)
    assert sys.stderr is stderr
    assert caught.tb is not None  # the frames are still held: the bar did not wait for them


@on_terminal
def test_break_erases_the_bar(terminal):
    for item in track(range(5), "fit"):
        if item == 2:
            break
    assert_erased(terminal)


@on_terminal
def test_nested_tasks_share_the_terminal(terminal):
    for category in track(["bottle", "cable"], "categories"):
        with task(category, 4) as advance:
            advance(3)
            terminal.wait_for(category)
            terminal.wait_for("3/4")
    terminal.wait_for("categories")
    assert_erased(terminal)


@on_terminal
def test_inner_failure_leaves_the_outer_bar(terminal):
    with task("outer", 3) as advance_outer:
        advance_outer()
        with pytest.raises(ValueError, match="inner"):
            fail_in_a_task(ValueError("inner"))
        assert progress._display._bars is not None
        advance_outer()
        terminal.wait_for("2/3")
    assert_erased(terminal)


@on_terminal
def test_tasks_of_several_threads_share_the_terminal(terminal):
    def work(index):
        for _ in track(range(100), f"worker {index}"):
            time.sleep(0.001)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_erased(terminal)


# In a process of its own

LOAD = """
import importlib.util, os, signal, sys
spec = importlib.util.spec_from_file_location("progress", sys.argv[1])
progress = importlib.util.module_from_spec(spec)
spec.loader.exec_module(progress)
"""


def run_in_terminal(script):
    terminal = Terminal()
    command = [sys.executable, "-c", LOAD + script, progress.__file__]
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "160"}
    try:
        run = subprocess.run(
            command, check=False, stdout=subprocess.PIPE, stderr=terminal.slave, env=environment
        )
    finally:
        os.close(terminal.slave)
    return run, terminal.close()


def test_rich_is_imported_only_for_a_bar_that_is_shown():
    run, shown = run_in_terminal(
        "assert list(progress.track([1, 2], 'fit')) == [1, 2]\n"
        "assert 'rich' not in sys.modules\n"
        "progress.DELAY = 0.0\n"
        "assert list(progress.track([1, 2], 'fit')) == [1, 2]\n"
        "assert 'rich' in sys.modules\n"
    )
    assert run.returncode == 0, shown


def test_cursor_is_shown_again_after_an_interrupt():
    run, shown = run_in_terminal(
        "progress.DELAY = 0.0\n"
        "bar = progress.track(range(3), 'fit')\n"  # a name that outlives the error
        "for item in bar:\n"
        "    if item == 1:\n"
        "        signal.raise_signal(signal.SIGINT)\n"
    )
    assert run.returncode != 0
    assert "KeyboardInterrupt" in shown
    assert shown.count(HIDE_CURSOR) == shown.count(SHOW_CURSOR) == 1


def test_bar_is_erased_and_standard_output_stays_clean():
    run, shown = run_in_terminal(
        "import time\n"
        "progress.DELAY = 0.1\n"
        "for _ in progress.track(range(4), 'fit'):\n"
        "    time.sleep(0.15)\n"
        "print('scores')\n"
    )
    assert run.returncode == 0
    assert run.stdout == b"scores\n"
    assert "3/4" in shown
    assert ERASE_LINE in shown[shown.rindex("fit") :]
