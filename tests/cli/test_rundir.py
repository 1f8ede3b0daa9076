"""The run directory as commands read it: damage is found and named."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize("name", ["config.json", "best.safetensors", "float.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "gone", "edited"])
def test_damaged_runs(daq, run, name, damage):
    file = run / name
    if damage == "gone":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    else:
        file.write_text('{"job": {"model": "os:system"}}')
    message = daq("freeze", run, "--overwrite").fails()
    assert name in message or damage == "gone"
