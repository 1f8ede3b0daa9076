"""The last steps of a run (freeze, save, export, check in ONNX Runtime, take times) and the summary of the run."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from daqconvert.artifact import save
from daqconvert.cli.bench import run_openers
from daqconvert.cli.job import Opened
from daqconvert.cli.options import as_options
from daqconvert.cli.output import say
from daqconvert.cli.rundir import ARTIFACT, FLOAT, FLOAT_ONNX, HINT, ONNX, SUMMARY, Config, size_of
from daqconvert.data import Loaders
from daqconvert.deploy.comparing.export_report import ExportReport, ProgramReport
from daqconvert.deploy.comparing.timing import time_in_turns
from daqconvert.deploy.exporting import export, export_float
from daqconvert.errors import DaqError, TrainingError
from daqconvert.files import write_text
from daqconvert.freezing import freeze
from daqconvert.report.tables import render, simple_table
from daqconvert.report.training_page import Deployment, with_result
from daqconvert.training import EvalResult, evaluate
from daqconvert.training.rundir import PAGE

CHECKED_IMAGES = 1000
Report = ExportReport | ProgramReport


@dataclass(frozen=True)
class Deployed:
    """What was written, and whether the ONNX file agrees with the frozen model.

    Attributes:
        frozen: Accuracy of the frozen model on all held-out images.
        files: Bytes by name: `float`, `artifact`, and with ONNX `float_onnx`, `onnx`.
        report: How well ONNX Runtime agrees with the frozen model; None without an ONNX file.
        seconds: Seconds per image: `torch`, `float_onnx`, `onnx`.
        failed: What could not be written or measured, and why, a sentence each; the rest is there all the same.
    """

    frozen: EvalResult
    files: dict[str, int]
    report: ExportReport | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    failed: tuple[str, ...] = ()

    @property
    def problems(self) -> list[str]:
        """Why the ONNX file does not agree; empty where it does, or there is none."""
        return [] if self.report is None else self.report.problems()


def deploy(out: Path, opened: Opened, qmodel: nn.Module, *, onnx: bool) -> Deployed:
    """Freeze a quantized model and write its artifact into the run directory, and with `onnx` also ONNX files."""
    frozen = freeze(qmodel)
    measured = evaluate(frozen, opened.loaders.val)
    frozen.cpu()
    save(frozen, out / ARTIFACT, overwrite=True, **opened.artifact_source)
    files = {"float": size_of(out / FLOAT), "artifact": size_of(out / ARTIFACT)}
    if not onnx:
        return Deployed(measured, files)
    say("exporting to ONNX")
    example, failed = opened.example.cpu(), _Failures()
    report = None
    with failed.noted(ONNX, out / ONNX):
        report = export_checked(frozen, out / ONNX, opened, overwrite=True)
        files["onnx"] = size_of(out / ONNX)
    with failed.noted(FLOAT_ONNX, out / FLOAT_ONNX):
        export_float(opened.model.cpu(), out / FLOAT_ONNX, example, overwrite=True)
        files["float_onnx"] = size_of(out / FLOAT_ONNX)
    say("taking times")
    times: dict[str, float] = {}
    with failed.noted("times"):
        openers = run_openers(out, opened, example)
        del openers["frozen"]
        found = time_in_turns(openers, torch.get_num_threads())
        times = {name: timing.median for name, timing in found.items()}
    assert report is None or isinstance(report, ExportReport)  # ONNX is no name of a program
    return Deployed(measured, files, report, times, tuple(failed))


class _Failures(list[str]):
    """Notes errors of the steps after training, each of which can fail without harm to the others."""

    @contextmanager
    def noted(self, what: str, file: Path | None = None) -> Iterator[None]:
        """Note and print an error of the block; a file of that name that an earlier run left is removed then."""
        try:
            yield
        except Exception as error:  # NOTE: of any kind: what was trained is worth more than how a step failed
            said = as_options(str(error)) if isinstance(error, DaqError) else f"{type(error).__name__}: {error}"
            self.append(f"{what}: {' '.join(said.split())}")
            say(self[-1])
            if file is not None:
                file.unlink(missing_ok=True)


def export_checked(frozen: nn.Module, path: Path, opened: Opened, overwrite: bool) -> Report:
    """Export a frozen model (on the CPU) and compare the file with it on held-out images, about a thousand at most."""
    return quiet_export(frozen, path, opened.example.cpu(), _some(opened.loaders.val), overwrite)


def quiet_export(frozen: nn.Module, path: Path, example: Tensor, batches: Any, overwrite: bool) -> Report:
    """Export without the warning about disagreement, which the command reports itself, also by its exit code."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not agree with the model.*")
        return export(frozen, path, example, check_batches=batches, overwrite=overwrite)


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
    ("{bits}, frozen", "frozen", f"{ARTIFACT}/", "artifact", None),
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
        "top1": {"float": top1[0], "quantized": top1[1], "frozen": deployed.frozen.top1, "onnx": _onnx_top1(deployed)},
        "bytes": deployed.files,
        "seconds_per_image": deployed.seconds,
        "onnx": None if report is None else {**report.to_dict(), "path": ONNX},
        "failed": list(deployed.failed),
        "onnx_class_agreement": same,
        "onnx_images_checked": None if report is None else report.samples - 1,  # the first is the example
        "seconds": round(seconds, 1),
    }


def summary_text(document: Mapping[str, Any], out: Path) -> str:
    """Return the summary as text: the table, and below it the files to read; `document` may be from `summary.json`."""
    lines = [f"{document['model']} on {document['data']}: {document['seconds']:.0f} s", *_agreement(document)]
    columns, rows = _table(document)
    read = [name + "/" * (key == "tensorboard") for key, name in document["files"].items()]
    return "\n".join([*lines, render(simple_table("", columns, rows)), f"in {out}: {', '.join([*read, SUMMARY])}"])


def show_on_page(out: Path, document: Mapping[str, Any]) -> None:
    """Put the summary at the top of the run's page, if the run has one."""
    page = out / PAGE
    if not page.is_file():
        return
    columns, rows = _table(document)
    result = Deployment(_cards(document), columns, rows, [f"data: {document['data']}", *_agreement(document)])
    write_text(page, with_result(page.read_text(encoding="utf-8"), result), TrainingError, HINT)


def _cards(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    top1, sizes, times = document["top1"], document["bytes"], document["seconds_per_image"]
    measured = "top-1" if document["measured_by"] == "labels" else "as float"
    cards = [
        (f"{100 * top1[key]:.2f} %", f"{name}, {measured}") for key, name in CARDS.items() if top1.get(key) is not None
    ]
    ratio = sizes["float"] / sizes["artifact"]
    cards.append((f"{ratio:.1f}x smaller", f"{sizes['artifact'] / 1000:.1f} kB, float {sizes['float'] / 1000:.1f} kB"))
    if {"onnx", "float_onnx"} <= times.keys():
        told = f"{_milliseconds(times['onnx'])} an image in ONNX Runtime, float {_milliseconds(times['float_onnx'])}"
        cards.append((f"{times['float_onnx'] / times['onnx']:.2f}x as fast", told))
    return cards


CARDS = {"float": "float", "quantized": "quantized", "frozen": "frozen", "onnx": "ONNX Runtime"}


def _onnx_top1(deployed: Deployed) -> float | None:
    """Return the accuracy in ONNX Runtime where it is known: it gave the frozen model's class for every image."""
    report = deployed.report
    if report is None or report.class_agreement != 1.0 or report.samples - 1 < deployed.frozen.count:
        return None
    return deployed.frozen.top1


def _agreement(document: Mapping[str, Any]) -> list[str]:
    same, checked = document["onnx_class_agreement"], document["onnx_images_checked"]
    failed = [f"failed: {what}" for what in document.get("failed", ())]  # a summary of an earlier version has none
    if same is None:
        return failed
    return [*failed, f"ONNX Runtime gives the frozen model's class for {same:.2%} of {checked} images"]


def _table(document: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str | None, ...]]]:
    """Return the headings and the rows of the summary; one written by an earlier version lacks some accuracies."""
    top1 = document["top1"]
    rows: list[tuple[str | None, ...]] = [
        (
            what.format(bits=document["bits"]),
            None if accuracy is None or top1.get(accuracy) is None else f"{100 * top1[accuracy]:.2f} %",
            file,
            f"{document['bytes'][size] / 1000:.1f} kB",
            _milliseconds(document["seconds_per_image"].get(time)),
        )
        for what, accuracy, file, size, time in ROWS
        if size in document["bytes"]
    ]
    measured = "top-1" if document["measured_by"] == "labels" else "as float"
    return ("model", measured, "file", "size", "time per image"), rows


def _milliseconds(seconds: float | None) -> str | None:
    return None if seconds is None else f"{1000 * seconds:.2f} ms"
