"""`daqconvert eval`: accuracy of everything that a run holds, of an artifact, or of a model by name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from torch import nn

from daqconvert.artifact import load, read_manifest
from daqconvert.artifact.manifest import MANIFEST
from daqconvert.cli import options as o
from daqconvert.cli import rundir
from daqconvert.cli.job import DEMO_MODEL, Job
from daqconvert.cli.output import Output
from daqconvert.cli.sources import (
    EVAL_BATCH,
    MODEL,
    RUN,
    calibrated,
    data_changes,
    kind_of,
    load_artifact,
    loaders_of,
    open_named,
    refuse,
)
from daqconvert.convert import current_plan
from daqconvert.models import copy_model
from daqconvert.report.tables import render, simple_table
from daqconvert.spec import Policy
from daqconvert.training import evaluate

Source = Annotated[str, typer.Argument(help=f"A run directory, an artifact, or a model ({o.FORMS}).")]
Results = dict[str, dict[str, Any]]


def evaluate_command(
    *, source: Source, code_model: o.CodeModel = None, weights: o.ModelOptions,
    data: Annotated[o.DataOptions, o.Without("val")], bits: o.PolicyOptions, as_json: o.Json = False,
) -> None:  # fmt: skip
    """Measure top-1 on held-out images.

    Of a run: its float, quantized and frozen model. Of a model by name: float, and, with an option on bits, quantized
    and calibrated without training. Classes of other data are mapped to the run's or artifact's by name; those of
    published ImageNet weights are known by synset, word and number.
    """
    with Output(as_json).capturing() as output:
        kind, size = kind_of(source), data.batch_size or EVAL_BATCH
        asked = bits.read()
        name = source if kind == MODEL else DEMO_MODEL  # of a run or artifact, the data's options alone count
        job = o.job_from(name, weights, data)
        if kind == MODEL:
            refuse(kind, model=code_model)
            text, found = _named(job, asked, size)
        else:
            refuse(kind, weights, policy=asked)
            text, found = (_run if kind == RUN else _artifact)(Path(source), code_model, job, size)
        rows = [(what, f"{100 * one['top1']:.2f} %", one["loss"], one["images"]) for what, one in found.items()]
        table = simple_table("", ("model", "top-1", "loss", "images"), rows)
        output.show(f"{source} on {text}\n{render(table)}", {"target": source, "data": text, "results": found})


def _measure(model: nn.Module, loader: Any) -> dict[str, Any]:
    result = evaluate(model, loader)
    return {"top1": result.top1, "loss": result.loss, "images": result.count}


def _named(job: Job, asked: Policy | None, batch_size: int) -> tuple[str, Results]:
    opened = open_named(job, batch_size, labels=True)
    found = {"float": _measure(opened.model, opened.loaders.val)}
    if asked is not None:
        qmodel = calibrated(opened, asked)
        found[f"{current_plan(qmodel).label}, calibrated"] = _measure(qmodel, opened.loaders.val)
    return opened.loaders.description, found


def _run(path: Path, typed: str | None, job: Job, batch_size: int) -> tuple[str, Results]:
    config, opened = rundir.open_run(path, typed, batch_size, data_changes(job), labels=True)
    loader = opened.loaders.val
    found = {"float": _measure(opened.model, loader)}
    bits, skeleton = config.plan.label, copy_model(opened.model)
    if (path / rundir.BEST).is_file():
        found[f"{bits}, quantized"] = _measure(rundir.quantized_model(path, config, opened), loader)
    artifact = path / rundir.ARTIFACT
    if (artifact / MANIFEST).is_file():
        found[f"{bits}, frozen"] = _measure(load(artifact, model=skeleton).eval(), loader)
    return opened.loaders.description, found


def _artifact(path: Path, typed: str | None, job: Job, batch_size: int) -> tuple[str, Results]:
    frozen = load_artifact(path, typed)
    loaders = loaders_of(path, frozen, job, batch_size, labels=True)
    return loaders.description, {f"{read_manifest(path).plan.label}, frozen": _measure(frozen, loaders.val)}
