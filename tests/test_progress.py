"""Progress bars: when they appear, what they say, and that they always go away."""

import fcntl
import functools
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
import time
from types import SimpleNamespace

import pytest

from npad import progress
from npad.progress import task, track


class Terminal:
    """A terminal of 24 lines of 100 columns whose output is collected."""

    def __init__(self):
        self._master, self.slave = pty.openpty()
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
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

    def screen(self):
        """What a person sees: the lines that are not blank."""
        lines, row, column = [[]], 0, 0
        for token in re.findall(r"\x1b\[A|\r|\n|.", self.text):
            if token == "\r":
                column = 0
            elif token == "\n":
                row += 1
                lines += [[]] * (row == len(lines))
            elif token == "\x1b[A":
                row -= 1
            else:
                lines[row] += " " * (column + 1 - len(lines[row]))
                lines[row][column] = token
                column += 1
        return [text for line in lines if (text := "".join(line).rstrip())]

    def close(self):
        self._reader.join(timeout=10)
        os.close(self._master)


@pytest.fixture
def terminal(monkeypatch):
    """A terminal on which bars appear at once."""
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
            test(terminal=terminal, **fixtures)

    return run


def assert_erased(terminal):
    print("end of the bars", file=sys.stderr, flush=True)
    terminal.wait_for("end of the bars\r\n")
    assert terminal.text.startswith("\r")  # there was something to erase
    assert terminal.screen() == ["end of the bars"]


# When


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
def test_a_bar_appears_after_the_delay(terminal, monkeypatch):
    monkeypatch.setattr(progress, "DELAY", 0.4)
    for item in track(range(7), "fit", 7):
        time.sleep(0.1)
        if item == 2:
            assert terminal.text == ""
    terminal.wait_for("fit: ")
    monkeypatch.setattr(progress, "DELAY", 60)
    before = terminal.text
    list(track(range(7), "short", 7))
    assert terminal.text == before


def test_a_notebook_is_no_terminal_and_has_bars(monkeypatch):
    notebook = SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel=object()))
    monkeypatch.setitem(sys.modules, "IPython", notebook)
    monkeypatch.setattr(progress, "DELAY", 0.0)
    for enabled, shown in ((None, True), (False, False)):
        monkeypatch.setattr(sys, "stderr", io.StringIO())
        list(track([1, 2], "fit", enabled=enabled))
        assert ("fit: " in sys.stderr.getvalue()) == shown


# What


@on_terminal
def test_a_bar_shows_description_count_time_left_and_rate(terminal):
    with task("fit [bottle]", 40, unit="images") as advance:
        time.sleep(0.2)
        advance(10)
        terminal.wait_for("10/40")
        (line,) = terminal.screen()
        assert re.fullmatch(
            r"fit \[bottle\]:  25%\|\S+ +\| 10/40 \[00:00<00:0\d, +[\d.]+ images/s\]", line
        )
    assert_erased(terminal)


@on_terminal
def test_without_a_total_the_count_is_shown(terminal):
    with task("predict", unit="images") as advance:
        time.sleep(0.2)
        advance(10)
        terminal.wait_for("predict: 10 images [")
    assert_erased(terminal)


@on_terminal
def test_bytes_have_prefixes(terminal):
    with task("Reading a.npad", 345_678_901, unit="B") as advance:
        time.sleep(0.2)
        advance(12_345_678)
        terminal.wait_for("12.3M/346M")
        terminal.wait_for("MB/s]")
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
def test_a_bar_is_erased_before_an_error_is_reported(terminal, work, error):
    with pytest.raises(error) as caught:
        work(error)
    assert_erased(terminal)
    assert caught.tb is not None  # the frames are still held: the bar did not wait for them


@on_terminal
def test_break_erases_the_bar(terminal):
    for item in track(range(5), "fit"):
        if item == 2:
            break
    assert_erased(terminal)


@on_terminal
def test_nested_tasks_share_the_terminal(terminal):
    for category in track(["bottle", "cable"], "categories", 2):
        with task(category, 4) as advance:
            time.sleep(0.2)
            advance(3)
            terminal.wait_for(f"{category}:  75%")
            assert len(terminal.screen()) == 2
    assert_erased(terminal)


@on_terminal
def test_standard_output_is_left_alone(terminal, capsys):
    with task("fit", 2) as advance:
        advance()
        print("score,0.5")
    assert capsys.readouterr().out == "score,0.5\n"
    assert "score" not in terminal.text


# In a process of its own


def run_in_terminal(script):
    terminal = Terminal()
    try:
        run = subprocess.run(
            [sys.executable, "-c", f"import sys\nfrom npad import progress\n{script}"],
            check=False,
            stdout=subprocess.PIPE,
            stderr=terminal.slave,
        )
    finally:
        os.close(terminal.slave)
    terminal.close()
    return run, terminal


def test_tqdm_is_imported_only_where_a_bar_may_be_shown():
    code = "import sys, npad.progress as p; print(*p.track([1], 'fit'), 'tqdm' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert run.stdout.strip() == b"1 False"


def test_an_interrupt_leaves_the_terminal_clean():
    run, terminal = run_in_terminal(
        "import signal\n"
        "progress.DELAY = 0.0\n"
        "for item in progress.track(range(3), 'fit'):\n"
        "    if item == 1:\n"
        "        signal.raise_signal(signal.SIGINT)\n"
    )
    assert run.returncode != 0
    assert "fit: " in terminal.text
    assert terminal.screen()[-1] == "KeyboardInterrupt"
    assert not any("fit: " in line for line in terminal.screen())
