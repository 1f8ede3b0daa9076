"""`daqconvert export`: an ONNX file, checked in ONNX Runtime."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from daqconvert.artifact import read_manifest
from daqconvert.cli import options as o
from daqconvert.cli import rundir
from daqconvert.cli.deployment import Report, export_checked, quiet_export
from daqconvert.cli.output import Output, fail
from daqconvert.cli.sources import (
    ARTIFACT,
    EVAL_BATCH,
    MODEL,
    RUN,
    calibrated,
    example_image,
    kind_of,
    load_artifact,
    needs_out,
    open_named,
    refuse,
)
from daqconvert.errors import ExportError
from daqconvert.freezing import freeze

Source = Annotated[str, typer.Argument(help=f"A run directory, an artifact, or a model ({o.FORMS}).")]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        help="The ONNX file, or a program if its name ends in .pt2. Default: model.onnx in the run.",
        show_default=False,
    ),
]


def export_command(
    *, source: Source, out: Out = None, code_model: o.CodeModel = None, weights: o.ModelOptions,
    data: Annotated[o.DataOptions, o.Without("val", "batch_size")], bits: o.PolicyOptions,
    overwrite: o.Overwrite = False, as_json: o.Json = False,
) -> None:  # fmt: skip
    """Write an ONNX file and compare it with the frozen model in ONNX Runtime; exit code 1 if they disagree.

    To a name that ends in .pt2: a program of torch.export, loaded again and compared with the frozen model.

    Of a run: the epoch that it ends with, compared on held-out images. Of an artifact: compared on one random image.
    Of a model by name: quantized as the options say (4 bits by default), calibrated, not trained.
    """
    with Output(as_json).capturing() as output:
        kind = kind_of(source)
        asked = bits.read()
        if kind != MODEL:
            side = None if kind == ARTIFACT else data.input_size  # an artifact may need it
            refuse(kind, weights, dataclasses.replace(data, input_size=side, workers=0), policy=asked)
        file = Path(source) / rundir.ONNX if out is None and kind == RUN else needs_out(out, "ONNX file")
        if kind == ARTIFACT:
            report = _export_artifact(Path(source), file, code_model, data.input_size, overwrite)
        elif kind == MODEL:
            refuse(kind, model=code_model)
            opened = open_named(o.job_from(source, weights, data))
            frozen = freeze(calibrated(opened, asked or o.default_policy())).cpu()
            report = export_checked(frozen, file, opened, overwrite)
        else:
            report = _export_run(Path(source), file, code_model, overwrite)
        output.show(str(report), report.to_dict())
        if not report.agrees:
            fail(f"{file} does not agree with the frozen model: {'; '.join(report.problems())}", 1)


def _export_run(path: Path, out: Path, typed: str | None, overwrite: bool) -> Report:
    config, opened = rundir.open_run(path, typed, EVAL_BATCH)
    frozen = freeze(rundir.quantized_model(path, config, opened)).cpu()
    return export_checked(frozen, out, opened, overwrite)


def _export_artifact(path: Path, out: Path, typed: str | None, side: int | None, overwrite: bool) -> Report:
    frozen = load_artifact(path, typed)
    example = example_image(frozen, typed or str(read_manifest(path).source or ""), side)
    if example is None:
        raise ExportError(f"{path}: the size of its images is not known. Give --input-size.")
    return quiet_export(frozen, out, example, None, overwrite)
