"""Every example runs as a user would run it: in its own process, in an empty folder, in limited time."""

import resource

import pytest

from helpers.children import ROOT, python

EXAMPLES = ROOT / "examples"
MINUTE = 60.0  # seconds of processor time: what other programs run meanwhile does not count
NAMES = ["export_onnx.py", "mixed_bits.py", "own_module.py", "quickstart.py", "timm_finetune.py"]


def test_examples_are_these():
    assert sorted(path.name for path in EXAMPLES.glob("*.py")) == NAMES


def processor_time() -> float:
    """Return the processor seconds of all children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize("name", NAMES)
def test_example_runs(name, tmp_path):
    before = processor_time()
    child = python(EXAMPLES / name, cwd=tmp_path)
    assert child.returncode == 0, child.stderr
    assert child.stdout.strip(), "an example shows what it did"
    assert processor_time() - before < MINUTE
