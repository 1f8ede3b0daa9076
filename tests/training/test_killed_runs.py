"""A run that is killed by SIGKILL at any moment and resumed is one that was not: weights, averages, history."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from training.test_resume import same

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")


def killed(folder: Path, kills: int, epochs: int, seed: int = 0) -> list[int]:
    root = Path(__file__).parents[2]
    paths = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root / "src"), str(root / "tests")])}
    program, numbers = root / "tests" / "helpers" / "killed_runs.py", map(str, (kills, epochs, seed))
    command = [sys.executable, "-W", "error", str(program), str(folder), *numbers]
    env = {**paths, "OMP_NUM_THREADS": "1"}
    said = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True)
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
