"""The last thing `finetune` prints: one table of accuracy, size and time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from daqconvert.cli.deployment import Deployed
from daqconvert.cli.rundir import ARTIFACT, FLOAT, FLOAT_ONNX, ONNX, SUMMARY, Config
from daqconvert.data import Loaders
from daqconvert.report.tables import render, simple_table
from daqconvert.spec import Plan

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
