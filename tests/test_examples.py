"""Every example runs as a user would run it: in its own process, in an empty folder, within its minute."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
NAMES = ["export_onnx.py", "mixed_bits.py", "own_module.py", "quickstart.py", "timm_finetune.py"]
LIMIT = 120  # seconds: twice what an example may take, for a busy machine


def test_examples_are_these():
    assert sorted(path.name for path in EXAMPLES.glob("*.py")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_example_runs(name, child_env, tmp_path):
    child = subprocess.run(
        [sys.executable, EXAMPLES / name], env=child_env, cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT
    )
    assert child.returncode == 0, child.stderr
    assert child.stdout.strip(), "an example shows what it did"
