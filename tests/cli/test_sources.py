"""What a command is given to work on: a word that names nothing is refused by all of them."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize("command", ["plan", "eval", "freeze", "export", "inspect"])
def test_sources_that_are_none(daq, tmp_path, command):
    assert "neither a run directory" in daq(command, tmp_path).fails()
    assert "timm has no model 'resnet1x'" in daq(command, "resnet1x", *out(command, tmp_path)).fails()


def out(command, tmp_path):
    weights = ("--checkpoint", tmp_path / "w.pt") if command in ("eval", "freeze", "export") else ()
    return (*weights, "--out", tmp_path / "x") if command in ("freeze", "export") else weights
