"""The last steps of a run: freeze, save, export, check in ONNX Runtime, take times."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from daqconvert.artifact import save
from daqconvert.cli import rundir
from daqconvert.cli.job import Opened
from daqconvert.cli.output import say
from daqconvert.cli.timing import run_openers
from daqconvert.deploy.export import export
from daqconvert.deploy.float_export import export_float
from daqconvert.deploy.reports import ExportReport
from daqconvert.deploy.timing import time_in_turns
from daqconvert.freezing import freeze

CHECKED_IMAGES = 1000


@dataclass(frozen=True)
class Deployed:
    """What was written, and how well it holds.

    Attributes:
        files: Bytes by name: `float`, `artifact`, and with ONNX `float_onnx`, `onnx`.
        report: How well ONNX Runtime agrees with the frozen model, or None.
        seconds: Seconds per image: `torch`, `float_onnx`, `onnx`.
    """

    files: dict[str, int]
    report: ExportReport | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def problems(self) -> list[str]:
        """Why the ONNX file does not agree; empty where it does, or there is none."""
        return [] if self.report is None else self.report.problems()


def deploy(out: Path, opened: Opened, qmodel: nn.Module, *, onnx: bool) -> Deployed:
    """Freeze a quantized model and write its artifact and ONNX files into the run directory.

    Args:
        out: The run directory.
        opened: The float model and its data.
        qmodel: The quantized model.
        onnx: Whether ONNX files are written, checked and timed.
    """
    frozen = freeze(qmodel).cpu()
    save(frozen, out / rundir.ARTIFACT, overwrite=True, **opened.artifact_source)
    files = {"float": size_of(out / rundir.FLOAT), "artifact": size_of(out / rundir.ARTIFACT)}
    if not onnx:
        return Deployed(files)
    say("exporting to ONNX")
    example = opened.example.cpu()
    report = export_checked(frozen, out / rundir.ONNX, opened, overwrite=True)
    export_float(opened.model.cpu(), out / rundir.FLOAT_ONNX, example, overwrite=True)
    files |= {"float_onnx": size_of(out / rundir.FLOAT_ONNX), "onnx": size_of(out / rundir.ONNX)}
    say("taking times")
    openers = run_openers(out, opened, example)
    del openers["frozen"]
    times = time_in_turns(openers, torch.get_num_threads())
    return Deployed(files, report, {name: timing.median for name, timing in times.items()})


def export_checked(frozen: nn.Module, path: Path, opened: Opened, overwrite: bool) -> ExportReport:
    """Export a frozen model and compare the file with it on held-out images, the first thousand at most.

    Args:
        frozen: On the CPU.
        path: The file.
        opened: Gives the images.
        overwrite: Whether the file may be replaced.
    """
    return quiet_export(frozen, path, opened.example.cpu(), _some(opened.loaders.val), overwrite)


def quiet_export(frozen: nn.Module, path: Path, example: Tensor, batches: Any, overwrite: bool) -> ExportReport:
    """Export without the warning about disagreement: the command says so itself, by its exit code too.

    Args:
        frozen: On the CPU.
        path: The file.
        example: One image.
        batches: What to compare on besides.
        overwrite: Whether the file may be replaced.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not agree with the model.*")
        report = export(frozen, path, example, check_batches=batches, overwrite=overwrite)
    assert isinstance(report, ExportReport)  # which it is for every path but a .pt2
    return report


def _some(loader: Any) -> Iterator[Any]:
    seen = 0
    for batch in loader:
        if seen >= CHECKED_IMAGES:
            return
        seen += len(batch[0])
        yield batch


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of all files in a folder.

    Args:
        path: The file or folder.
    """
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)
