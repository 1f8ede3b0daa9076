"""`daqconvert` and `python -m daqconvert.cli` themselves: one line for a mistake, exit code 2, usage errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import daqconvert


def test_main_and_python_m(child_env):
    done = subprocess.run(
        [sys.executable, "-m", "daqconvert.cli", "inspect", "nothing-here", "--json"],
        capture_output=True,
        text=True,
        env=child_env,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.strip().splitlines()) == 1
    assert "timm has no model 'nothing-here'" in done.stderr


def test_usage_errors(daq):
    assert "No such option" in daq("plan", "resnet18", "--wbits", "3").fails()
    assert daq().code == 2
    assert daq("plan").code == 2


def test_version(daq):
    assert daq("--version").out.startswith(f"daqconvert {daqconvert.__version__} (torch {torch.__version__}, ")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
@pytest.mark.parametrize("arguments", [("recipes",), ("recipes", "--json"), ("--help",), ("--version",)], ids=" ".join)
def test_a_full_disk_behind_standard_output(child_env, arguments):
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "daqconvert", *arguments],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=child_env,
        )
    assert done.stderr == "Standard output could not be written (No space left on device).\n"
    assert done.returncode == 2


def test_a_reader_that_goes_away(child_env):
    """As `daqconvert recipes | head -1` does."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "daqconvert", "recipes"], stdout=write, stderr=subprocess.PIPE, text=True, env=child_env
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_terminal_that_has_fewer_letters(child_env, tmp_path, encoding):
    """Names that it cannot print are written as Python writes them; JSON is JSON, with the same names."""
    (tmp_path / "\u0142.toml").write_text("[default]\nw_bits = 3\n")
    environment = {**child_env, "PYTHONIOENCODING": encoding}
    command = [sys.executable, "-m", "daqconvert", "plan", "test_resnet", "--policy", "\u0142.toml"]
    done = subprocess.run([*command, "--json"], capture_output=True, env=environment, cwd=tmp_path)
    assert "\u0142.toml" in json.loads(done.stdout.decode(encoding))["policy"], done.stderr
    done = subprocess.run(command, capture_output=True, env=environment, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, b"")
    assert ("\u0142.toml" if encoding == "utf-8" else "\\u0142.toml") in done.stdout.decode(encoding)
