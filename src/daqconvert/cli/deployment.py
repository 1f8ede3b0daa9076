"""The last steps of a run: freeze, save, export, check in ONNX Runtime, take times.

The last thing `finetune` prints: one table of accuracy, size and time.

What is timed of a run: its float and its frozen model in torch, and its two ONNX files.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from daqconvert.artifact import load, save
from daqconvert.artifact.manifest import MANIFEST
from daqconvert.cli import rundir
from daqconvert.cli.job import Opened
from daqconvert.cli.output import say
from daqconvert.cli.rundir import ARTIFACT, FLOAT, FLOAT_ONNX, ONNX, SUMMARY, Config
from daqconvert.data import Loaders
from daqconvert.deploy.comparing.export_report import ExportReport
from daqconvert.deploy.comparing.timing import Call, Opener, onnx_opener, time_in_turns
from daqconvert.deploy.exporting import export, export_float
from daqconvert.freezing import freeze
from daqconvert.report.tables import render, simple_table
from daqconvert.sources import build_model, load_checkpoint
from daqconvert.spec import Plan

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


ROWS = (  # what, which accuracy, its file, key of the file's size, key of the time
    ("float, PyTorch", "float", FLOAT, "float", "torch"),
    ("float, ONNX Runtime", None, FLOAT_ONNX, "float_onnx", "float_onnx"),
    ("{bits}, frozen", "quantized", f"{ARTIFACT}/", "artifact", None),
    ("{bits}, ONNX Runtime", "onnx", ONNX, "onnx", "onnx"),
)


def bits_text(plan: Plan) -> str:
    """Return the widths that most layers of a plan have, as `W4A4`.

    Args:
        plan: The plan.

    Example:
        >>> bits_text(Plan((), "Net"))
        'float'
    """
    found = Counter((row.settings.w_bits or 32, row.settings.a_bits or 32) for row in plan if row.settings)
    return "W{}A{}".format(*found.most_common(1)[0][0]) if found else "float"


def summary_document(
    config: Config, data: Loaders, top1: tuple[float | None, float | None], deployed: Deployed, seconds: float
) -> dict[str, Any]:
    """Return everything that a run found, as plain values.

    Args:
        config: The run's configuration.
        data: What it was trained and measured on.
        top1: Accuracy of the float and of the quantized model on the held-out images.
        deployed: Files, agreement and times.
        seconds: Time of the whole run.
    """
    report = deployed.report
    same = None if report is None else report.class_agreement
    return {
        "model": str(config.job.source),
        "data": data.description,
        "measured_by": "labels" if data.val_labelled else "the float model's answers",
        "bits": bits_text(config.plan),
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
    """Return the summary as text: the table, and below it where there is more to read.

    Args:
        document: From `summary_document`, or read from `summary.json`.
        out: The run directory.
    """
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
