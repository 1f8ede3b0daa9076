"""The command of docs/imagenet.md from end to end, on ten made-up classes: killed, resumed, evaluated, exported."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_published_command_dry(root, child_env, tmp_path):
    pytest.importorskip("onnxruntime")
    script = root / "benchmarks" / "imagenet_path.py"
    small = ("--classes", "10", "--batch-size", "4", "--models", "resnet18", "--print")
    done = subprocess.run(
        [sys.executable, script, *small], env=child_env, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr  # the script checks each step
    (found,) = json.loads(done.stdout)["networks"].values()
    assert (found["bits"], found["steps"], found["images_evaluated"]) == ("W1A1", 5, 20)
    assert 1 <= found["killed_after_step"] < 5
    assert (found["onnx_class_agreement"], found["onnx_codes_differing"]) == (1.0, 0)
    assert found["bytes"]["artifact"] < found["bytes"]["float"] / 8
    assert "--preset paper-w1a1 --recipe paper-imagenet" in found["command"]
    assert not list(tmp_path.iterdir())
