"""`daqconvert` and `python -m daqconvert.cli` themselves: one line for a mistake, exit code 2, usage errors."""

from __future__ import annotations

import subprocess
import sys


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
