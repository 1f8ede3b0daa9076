"""Ctrl-C and SIGTERM: one line that says how to go on, and the exit code that shells expect."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest

from helpers.children import HANGING

SAID = {signal.SIGINT: ("Interrupted.", 130), signal.SIGTERM: ("Stopped by SIGTERM.", 143)}


def stopped(command, file, number, env):
    """Start a command, send it a signal once a file is there, and return exit code, output and errors."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite run in the background ignores it, and
    try:  # so would its child
        child = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
    finally:
        signal.signal(signal.SIGINT, before)
    try:
        deadline = time.monotonic() + HANGING
        while not file.exists() and child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        child.send_signal(number)
        out, err = child.communicate(timeout=HANGING)
    finally:
        child.kill()
    return child.returncode, out, err


@pytest.mark.parametrize("stage", ["float", "quantized"])
@pytest.mark.parametrize("number", SAID, ids=lambda number: number.name)
def test_stopped_runs_say_how_to_go_on(folder, tmp_path, child_env, number, stage):
    run = tmp_path / "run"
    epochs = ("40000", "1") if stage == "float" else ("1", "4000")
    options = [
        "--data",
        str(folder),
        "--float-epochs",
        epochs[0],
        "--epochs",
        epochs[1],
        "--batch-size",
        "6",
        "--no-onnx",
    ]
    command = [sys.executable, "-m", "daqconvert", "finetune", "test_resnet", *options, "--out", str(run)]
    file = run / ("config.json" if stage == "float" else "best.safetensors")
    said, code = SAID[number]
    found, out, err = stopped(command, file, number, child_env)
    assert (found, out) == (code, ""), err
    assert f"{said} Go on with: daqconvert finetune --out {run} --resume" in err
    assert "Traceback" not in err
    assert (run / "float.safetensors").exists() == (stage == "quantized")


@pytest.mark.slow
def test_going_on_after_sigterm(folder, tmp_path, child_env):
    """A run that SIGTERM stopped between two epochs or in one ends as an uninterrupted one does."""
    options = [
        "test_resnet",
        "--data",
        str(folder),
        "--float-epochs",
        "1",
        "--epochs",
        "12",
        "--batch-size",
        "6",
        "--no-onnx",
    ]
    second, code = tmp_path / "second", 0
    for attempt in range(10):  # on a busy machine a run may end before the signal comes
        first = tmp_path / f"first{attempt}"
        command = [sys.executable, "-m", "daqconvert", "finetune", *options, "--out", str(first)]
        code, _, err = stopped(command, first / "best.safetensors", signal.SIGTERM, child_env)
        if code != 0:
            break
    assert code == 143, err
    assert not (first / "summary.json").exists()
    subprocess.run([*command[:4], "--out", str(first), "--resume"], env=child_env, check=True, capture_output=True)
    subprocess.run([*command[:-1], str(second)], env=child_env, check=True, capture_output=True)
    one, two = (json.loads((run / "summary.json").read_text()) for run in (first, second))
    assert (one["epochs"], one["top1"]) == (12, two["top1"])
    files = (run / "artifact" / "model.safetensors" for run in (first, second))
    assert len({file.read_bytes() for file in files}) == 1
