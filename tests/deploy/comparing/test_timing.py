"""Contenders in processes of their own, in turns."""

import os
import time
from functools import partial

import pytest
import torch
from torch import nn

from daqconvert.deploy.comparing.timing import Timing, onnx_opener, time_in_turns
from daqconvert.deploy.exporting import export_float
from daqconvert.errors import ExportError


def sleeper(folder, name, seconds, threads):
    """Write down who is called, and by which process."""

    def call():
        with (folder / "log").open("a") as log:
            log.write(f"{name} {os.getpid()} {threads} {torch.get_num_threads()} {torch.is_grad_enabled()}\n")
        time.sleep(seconds)

    return call


def broken(how, threads):
    if how == "opening":
        raise ExportError("no such thing")
    return {"calling": lambda: 1 / 0, "dying": lambda: os._exit(3)}[how]


def test_in_turns_each_in_its_own_process(tmp_path):
    names = {"slow": 0.2, "fast": 0.0, "middle": 0.1}  # far apart: on a busy machine a sleep ends late
    told = []
    found = time_in_turns(
        {name: partial(sleeper, tmp_path, name, seconds) for name, seconds in names.items()},
        threads=1, rounds=2, repeats=3, warmup=1, tick=told.append,
    )  # fmt: skip
    rows = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    turns = [rows[i][0] for i in range(0, len(rows), 4)]
    assert turns == ["slow", "fast", "middle", "fast", "middle", "slow"]
    assert all({row[0] for row in rows[i : i + 4]} == {rows[i][0]} for i in range(0, len(rows), 4))
    assert len({row[1] for row in rows} | {str(os.getpid())}) == 4
    assert {tuple(row[2:]) for row in rows} == {("1", "1", "False")}
    assert told == [*names, *turns]
    assert found["fast"].median < found["middle"].median < found["slow"].median
    assert found["slow"].median >= 0.2 and len(found["slow"].rounds) == 2
    assert found["slow"].p95 >= found["slow"].median


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("opening", "bad: no such thing"),
        ("calling", "bad: ZeroDivisionError: division by zero"),
        ("dying", "bad: the process that times it ended too early"),
    ],
)
def test_a_contender_that_fails_is_named(tmp_path, how, message):
    openers = {"good": partial(sleeper, tmp_path, "good", 0.0), "bad": partial(broken, how)}
    with pytest.raises(ExportError, match=message):
        time_in_turns(openers, threads=1, rounds=1, repeats=1)


def test_onnx_file(tmp_path):
    x = torch.randn(2, 4)
    export_float(nn.Linear(4, 3).eval(), tmp_path / "a.onnx", x)
    found = time_in_turns({"file": onnx_opener(tmp_path / "a.onnx", x)}, threads=1, rounds=1, repeats=2)
    assert 0 < found["file"].median < 1


@pytest.mark.parametrize("wrong", [{"threads": 0}, {"threads": 1, "rounds": 0}, {"threads": 1, "repeats": 0}], ids=str)
def test_numbers_below_one(wrong):
    with pytest.raises(ValueError, match="expected 1 or more"):
        time_in_turns({}, **wrong)


def test_p95_is_the_time_that_95_of_100_do_not_exceed():
    found = Timing.of([[float(i) for i in range(1, 51)], [float(i) for i in range(51, 101)]])
    assert (found.median, found.p95, found.rounds) == (50.5, 95.0, (25.5, 75.5))
    assert Timing.of([[2.0]]) == Timing(2.0, 2.0, (2.0,))
