"""A run that is killed by SIGKILL at any moment and resumed ends like any other: weights, averages, history."""

import json
import os
from pathlib import Path

import pytest

from helpers import killed_runs
from helpers.checkpoints import same
from helpers.children import environment, python

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")


def killed(folder: Path, kills: int, epochs: int, seed: int = 0) -> list[int]:
    command = ("-W", "error", killed_runs.__file__, folder, kills, epochs, seed)
    said = python(*command, env=environment(1, tests=True))
    assert said.returncode == 0, said.stderr
    return json.loads(said.stdout.splitlines()[-1])


def check(folder: Path) -> None:
    for name in ("last.safetensors", "best.safetensors"):
        assert same(folder / "whole" / name, folder / "parts" / name)
    kept = [sorted(p.name for p in (folder / run).rglob("*.safetensors")) for run in ("whole", "parts")]
    assert kept[0] == kept[1]
    assert not list((folder / "parts").rglob(".*"))  # nothing half written is left


def test_killed_three_times(tmp_path):
    assert len(killed(tmp_path, 3, 4)) == 3
    check(tmp_path)


@pytest.mark.slow
def test_killed_twenty_times(tmp_path):
    steps = killed(tmp_path, 20, 40)
    assert len(set(steps)) > 3  # at different moments
    check(tmp_path)
