"""What is timed of a run: its float and its frozen model in torch, and its two ONNX files."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from daqconvert.artifact import load
from daqconvert.artifact.manifest import MANIFEST
from daqconvert.cli import rundir
from daqconvert.cli.job import Opened
from daqconvert.deploy.timing import Call, Opener, onnx_opener
from daqconvert.sources import build_model, load_checkpoint

FILES = {
    "torch": rundir.FLOAT, "float_onnx": rundir.FLOAT_ONNX, "frozen": rundir.ARTIFACT, "onnx": rundir.ONNX
}  # fmt: skip


def run_openers(path: Path, opened: Opened, images: Tensor) -> dict[str, Opener]:
    """Return how each model of a run is opened in a process of its own: keys of `FILES`, without what is not there.

    Args:
        path: The run directory.
        opened: Says how its model is built.
        images: The argument of a call.
    """
    model = str(opened.source), opened.model_args
    array = images.cpu().numpy()
    plain = partial(_open_float, model, path / rundir.FLOAT, array)
    if opened.source.kind == "hf-hub":  # even its configuration is a download: no other process can build it
        plain = partial(_call, opened.model.cpu(), array)
    there: dict[str, Opener] = {
        "torch": plain,
        "float_onnx": onnx_opener(path / rundir.FLOAT_ONNX, images.cpu()),
        "frozen": partial(_open_frozen, model, path / rundir.ARTIFACT, array),
        "onnx": onnx_opener(path / rundir.ONNX, images.cpu()),
    }
    is_there = {key: (path / name / MANIFEST if key == "frozen" else path / name) for key, name in FILES.items()}
    return {key: opener for key, opener in there.items() if is_there[key].is_file()}


def _open_float(model: tuple[str, dict[str, Any]], weights: Path, array: Any, threads: int) -> Call:
    built = build_model(model[0], **model[1])
    load_checkpoint(built, weights)
    return _call(built, array)


def _open_frozen(model: tuple[str, dict[str, Any]], artifact: Path, array: Any, threads: int) -> Call:
    return _call(load(artifact, model=build_model(model[0], **model[1])), array)


def _call(model: nn.Module, array: Any, threads: int = 1) -> Call:
    return partial(model.eval(), torch.from_numpy(array))
