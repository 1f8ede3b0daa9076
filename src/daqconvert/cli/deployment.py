"""The last steps of a run (freeze, save, export, check in ONNX Runtime, take times) and the summary of the run."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from daqconvert.artifact import save
from daqconvert.cli.bench import run_openers
from daqconvert.cli.job import Opened
from daqconvert.cli.output import say
from daqconvert.cli.rundir import ARTIFACT, FLOAT, FLOAT_ONNX, ONNX, SUMMARY, Config, size_of
from daqconvert.data import Loaders
from daqconvert.deploy.comparing.export_report import ExportReport
from daqconvert.deploy.comparing.timing import time_in_turns
from daqconvert.deploy.exporting import export, export_float
from daqconvert.freezing import freeze
from daqconvert.report.tables import render, simple_table

CHECKED_IMAGES = 1000


@dataclass(frozen=True)
class Deployed:
    """What was written, and whether the ONNX file agrees with the frozen model.

    Attributes:
        files: Bytes by name: `float`, `artifact`, and with ONNX `float_onnx`, `onnx`.
        report: How well ONNX Runtime agrees with the frozen model; None without an ONNX file.
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
    """Freeze a quantized model and write its artifact into the run directory, and with `onnx` also ONNX files."""
    frozen = freeze(qmodel).cpu()
    save(frozen, out / ARTIFACT, overwrite=True, **opened.artifact_source)
    files = {"float": size_of(out / FLOAT), "artifact": size_of(out / ARTIFACT)}
    if not onnx:
        return Deployed(files)
    say("exporting to ONNX")
    example = opened.example.cpu()
    report = export_checked(frozen, out / ONNX, opened, overwrite=True)
    export_float(opened.model.cpu(), out / FLOAT_ONNX, example, overwrite=True)
    files |= {"float_onnx": size_of(out / FLOAT_ONNX), "onnx": size_of(out / ONNX)}
    say("taking times")
    openers = run_openers(out, opened, example)
    del openers["frozen"]
    times = time_in_turns(openers, torch.get_num_threads())
    return Deployed(files, report, {name: timing.median for name, timing in times.items()})


def export_checked(frozen: nn.Module, path: Path, opened: Opened, overwrite: bool) -> ExportReport:
    """Export a frozen model (on the CPU) and compare the file with it on held-out images, about a thousand at most."""
    return quiet_export(frozen, path, opened.example.cpu(), _some(opened.loaders.val), overwrite)


def quiet_export(frozen: nn.Module, path: Path, example: Tensor, batches: Any, overwrite: bool) -> ExportReport:
    """Export without the warning about disagreement, which the command reports itself, also by its exit code."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not agree with the model.*")
        report = export(frozen, path, example, check_batches=batches, overwrite=overwrite)
    assert isinstance(report, ExportReport)  # only for a .pt2 file it is something else
    return report


def _some(loader: Any) -> Iterator[Any]:
    seen = 0
    for batch in loader:
        if seen >= CHECKED_IMAGES:
            return
        seen += len(batch[0])
        yield batch


ROWS = (  # name, key of the accuracy, file, key of the file's size, key of the time
    ("float, PyTorch", "float", FLOAT, "float", "torch"),
    ("float, ONNX Runtime", None, FLOAT_ONNX, "float_onnx", "float_onnx"),
    ("{bits}, frozen", "quantized", f"{ARTIFACT}/", "artifact", None),
    ("{bits}, ONNX Runtime", "onnx", ONNX, "onnx", "onnx"),
)


def summary_document(
    config: Config, data: Loaders, top1: tuple[float | None, float | None], deployed: Deployed, seconds: float
) -> dict[str, Any]:
    """Return the results of a run as plain values; `top1` has that of the float and that of the quantized model."""
    report = deployed.report
    same = None if report is None else report.class_agreement
    return {
        "model": str(config.job.source),
        "data": data.description,
        "measured_by": "labels" if data.val_labelled else "the float model's answers",
        "bits": config.plan.label,
        "epochs": config.recipe.epochs,
        "top1": {"float": top1[0], "quantized": top1[1]},
        "bytes": deployed.files,
        "seconds_per_image": deployed.seconds,
        "onnx": None if report is None else {**report.to_dict(), "path": ONNX},
        "onnx_class_agreement": same,
        "onnx_images_checked": None if report is None else report.samples - 1,  # the first is the example
        "seconds": round(seconds, 1),
    }


def summary_text(document: Mapping[str, Any], out: Path) -> str:
    """Return the summary as text: the table, and below it the files to read; `document` may be from `summary.json`."""
    same = document["onnx_class_agreement"]
    top1 = {**document["top1"], "onnx": document["top1"]["quantized"] if same == 1.0 else None}
    rows = [
        (
            what.format(bits=document["bits"]),
            None if accuracy is None or top1[accuracy] is None else f"{100 * top1[accuracy]:.2f} %",
            file,
            f"{document['bytes'][size] / 1000:.1f} kB",
            _milliseconds(document["seconds_per_image"].get(time)),
        )
        for what, accuracy, file, size, time in ROWS
        if size in document["bytes"]
    ]
    lines = [f"{document['model']} on {document['data']}: {document['seconds']:.0f} s"]
    if same is not None:
        checked = document["onnx_images_checked"]
        lines.append(f"ONNX Runtime gives the frozen model's class for {same:.2%} of {checked} images")
    measured = "top-1" if document["measured_by"] == "labels" else "as float"
    table = simple_table("", ("model", measured, "file", "size", "time per image"), rows)
    read = [name + "/" * (key == "tensorboard") for key, name in document["files"].items()]
    return "\n".join([*lines, render(table), f"in {out}: {', '.join([*read, SUMMARY])}"])


def _milliseconds(seconds: float | None) -> str | None:
    return None if seconds is None else f"{1000 * seconds:.2f} ms"
