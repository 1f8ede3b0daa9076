"""A bar on a terminal, silence elsewhere, and a clean terminal afterwards."""

import io
import sys
from collections.abc import Callable

import pytest

from daqconvert.report import progress as module
from daqconvert.report.progress import progress, track


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch) -> Callable[[], Terminal]:
    """Make standard error a terminal; to be called by the test, for pytest sets its own after the fixtures."""

    def start() -> Terminal:
        out = Terminal()
        monkeypatch.setattr(sys, "stderr", out)
        for name, value in (("TERM", "xterm"), ("COLUMNS", "100"), ("NO_COLOR", "1")):
            monkeypatch.setenv(name, value)
        return out

    return start


def test_a_bar_on_a_terminal(terminal):
    out = terminal()
    with progress(10, "calibrate [x]") as bar:
        bar.advance(3, loss=0.123456, batch=7)
        module._shown[0].refresh()
    assert bar.done == 3
    assert "calibrate [x]" in out.getvalue()
    assert "3/10" in out.getvalue().replace(" ", "")
    assert "loss 0.1235  batch 7" in out.getvalue()
    assert not module._shown


def test_what_a_training_run_shows(terminal):
    out = terminal()
    with progress(100, "finetuning") as bar:
        bar.advance(42, epoch="1/5", loss=0.6001234, top1=0.3125, lr=0.0212, per_s=569.4)
        module._shown[0].refresh()
    line = next(line for line in reversed(out.getvalue().splitlines()) if "epoch 1/5" in line)
    for said in ("finetuning", " 42/100", "0:00:00", "left", "epoch 1/5  loss 0.6001  top-1 31.25 %  lr 0.021  "):
        assert said in line, said  # of 100 characters; what is last is cut off first


def test_silence_elsewhere(capsys):
    with progress(10, "calibrate") as bar:
        bar.advance(loss=0.5)
        assert not module._shown
    assert bar.done == 1
    assert capsys.readouterr() == ("", "")


def test_silence_where_not_enabled(terminal):
    out = terminal()
    with progress(2, "calibrate", enabled=False) as bar:
        bar.advance(2)
    assert bar.done == 2
    assert list(track([1, 2], "calibrate", enabled=False)) == [1, 2]
    assert out.getvalue() == ""


def test_silence_without_a_standard_error(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    assert list(track(range(3), "calibrate")) == [0, 1, 2]


def test_the_terminal_is_given_back_on_an_exception(terminal):
    out = terminal()
    with pytest.raises(KeyboardInterrupt), progress(2, "finetune"):
        raise KeyboardInterrupt
    assert not module._shown
    assert out.getvalue().endswith("\x1b[2K\x1b[?25h\r")  # the line is wiped and the cursor shown


def test_a_bar_within_a_bar_shares_the_display(terminal):
    terminal()
    with progress(2, "finetune") as outer:
        display = module._shown[0]
        for _ in track(range(3), "evaluate"):
            assert module._shown == [display]
            assert [task.description for task in display.tasks] == ["finetune", "evaluate"]
        assert [task.description for task in display.tasks] == ["finetune"]
        outer.advance()
    assert not module._shown


def test_a_loop_that_is_left_early_ends_its_bar(terminal):
    terminal()
    items = track(range(3), "evaluate")
    assert next(items) == 0
    assert module._shown
    items.close()
    assert not module._shown


class Stream:
    """Like a DataLoader over an iterable data set."""

    def __iter__(self):
        return iter("abc")

    def __len__(self):
        raise TypeError("no length")


@pytest.mark.parametrize(
    ("iterable", "total", "shown"),
    [
        pytest.param([1, 2, 3], None, 3, id="list"),
        pytest.param(iter([1, 2, 3]), None, None, id="iterator"),
        pytest.param(iter([1, 2, 3]), 3, 3, id="iterator of known length"),
        pytest.param(Stream(), None, None, id="stream"),
    ],
)
def test_track_asks_for_the_length(iterable, total, shown, terminal):
    terminal()
    seen = 0
    for seen, _ in enumerate(track(iterable, "read", total), start=1):
        task = module._shown[0].tasks[0]
        assert (task.total, task.completed) == (shown, seen - 1)
    assert seen == 3
