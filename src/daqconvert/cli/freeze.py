"""`daqconvert freeze`: the artifact of a run's best epoch, or of a model that is calibrated and not trained."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Annotated

import typer
from torch import nn

from daqconvert.artifact import save
from daqconvert.cli import options as o
from daqconvert.cli import rundir
from daqconvert.cli.job import Opened
from daqconvert.cli.output import Output
from daqconvert.cli.rundir import size_of
from daqconvert.cli.sources import ARTIFACT, EVAL_BATCH, MODEL, calibrated, kind_of, needs_out, open_named, refuse
from daqconvert.convert import current_plan
from daqconvert.errors import ArtifactError
from daqconvert.freezing import freeze

Source = Annotated[str, typer.Argument(help=f"A run directory, or a model ({o.FORMS}).")]
Out = Annotated[
    Path | None, typer.Option("--out", help="The artifact. Default: artifact/ in the run.", show_default=False)
]


def freeze_command(
    *, source: Source, out: Out = None, code_model: o.CodeModel = None, weights: o.ModelOptions,
    data: Annotated[o.DataOptions, o.Without("val", "batch_size")], bits: o.PolicyOptions,
    overwrite: o.Overwrite = False, as_json: o.Json = False,
) -> None:  # fmt: skip
    """Write an artifact: weights as integer codes, packed at their bits.

    Of a run: the epoch that it ends with, the best, or the last where its recipe says so. Of a model by name:
    quantized as the options say (4 bits by default), calibrated on training images, not trained.
    """
    with Output(as_json).capturing() as output:
        kind = kind_of(source)
        asked = bits.read()
        _not_frozen_yet(kind, source)
        if kind == MODEL:
            refuse(kind, model=code_model)
            out = needs_out(out, "artifact")
            opened = open_named(o.job_from(source, weights, data))
            qmodel = calibrated(opened, asked or o.default_policy())
        else:
            refuse(kind, weights, dataclasses.replace(data, workers=0), policy=asked)
            config, opened = rundir.open_run(Path(source), code_model, EVAL_BATCH)
            qmodel = rundir.quantized_model(Path(source), config, opened)
            out = out or Path(source) / rundir.ARTIFACT
        _save(qmodel, opened, out, overwrite, output)


def _not_frozen_yet(kind: str, source: str) -> None:
    if kind == ARTIFACT:
        export = shlex.join(["daqconvert", "export", source])
        raise ArtifactError(f"{source} is an artifact already. {export} makes an ONNX file of it.")


def _save(qmodel: nn.Module, opened: Opened, out: Path, overwrite: bool, output: Output) -> None:
    frozen = freeze(qmodel).cpu()
    save(frozen, out, overwrite=overwrite, **opened.artifact_source)
    bits, size = current_plan(frozen).label, size_of(out)
    document = {"artifact": str(out), "bytes": size, "bits": bits, "source": opened.artifact_source.get("source")}
    output.show(f"{out}: {bits}, {size / 1000:.1f} kB", document)
