"""What a command is pointed at: a run directory, an artifact, or a model by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from daqconvert.artifact import load, read_manifest
from daqconvert.artifact.manifest import MANIFEST
from daqconvert.calibration import calibrate
from daqconvert.cli import rundir
from daqconvert.cli.job import Job, Opened, measured_by_float, open_job
from daqconvert.cli.options import given
from daqconvert.convert import quantize
from daqconvert.data import Loaders, create_loaders, open_splits
from daqconvert.errors import ArtifactError, ConversionError, DataError, PolicyError
from daqconvert.sources import build_model
from daqconvert.spec import Policy

EVAL_BATCH = 64
RUN, ARTIFACT, MODEL = "run", "artifact", "model"


def kind_of(target: str) -> str:
    """Return `"run"`, `"artifact"` or `"model"`.

    Args:
        target: A path or a model's name.

    Raises:
        ConversionError: If there is such a path and it is none of them.

    Example:
        >>> kind_of("resnet18")
        'model'
    """
    path = Path(target)
    if not path.exists():
        return MODEL
    if rundir.is_run(path):
        return RUN
    if (path / MANIFEST).is_file():
        return ARTIFACT
    raise ConversionError(
        f"{target}: neither a run directory (no {rundir.CONFIG}) nor an artifact (no {MANIFEST}). Give one of them, "
        "or a model's name."
    )


def refuse(kind: str, *groups: Any, **options: Any) -> None:
    """Raise if an option was given that has no effect on this kind of target.

    Raises:
        PolicyError: Names the first of them.
    """
    for group in groups:
        options |= given(group)
    for name, value in options.items():
        if value is not None and value is not False and value != []:
            raise PolicyError(
                f"--{name.replace('_', '-')} has no effect on {_article(kind)}: what it was made of is fixed."
            )


def _article(kind: str) -> str:
    return f"an {kind}" if kind == ARTIFACT else f"a {kind}"


def load_artifact(path: Path, typed: str | None) -> nn.Module:
    """Return the frozen model of an artifact; where it names no source, of the one that the user typed.

    Args:
        path: The artifact.
        typed: The `--model` option, with the arguments the artifact does not know.

    Raises:
        ArtifactError: If there is no model to load it into.
    """
    manifest = read_manifest(path)
    if manifest.source is None and typed is None:
        raise ArtifactError(f"{path}: it does not say how to build its {manifest.model}. Add --model module:function.")
    skeleton = None if typed is None else build_model(typed)
    return load(path, model=skeleton).eval()


def data_changes(job: Job) -> dict[str, Any]:
    """Return what the user says about the data, beside what a run was made with.

    Args:
        job: Read from the options.
    """
    names = ("data", "holdout", "data_root", "download", "input_size", "num_classes", "workers")
    default = Job()
    found = {name: getattr(job, name) for name in names if getattr(job, name) != getattr(default, name)}
    return found | ({"val": None} if "data" in found else {})  # which belongs to the run's own data


def loaders_of(path: Path, frozen: nn.Module, job: Job, batch_size: int) -> Loaders:
    """Return the data that the user named, as an artifact's model takes it.

    Args:
        path: The artifact.
        frozen: Its model.
        job: Read from the options.
        batch_size: Images a batch.

    Raises:
        DataError: If its images have no labels.
    """
    splits = (
        None
        if job.data is None
        else open_splits(job.data, job.holdout, job.seed, job.data_root, job.download, job.num_classes)
    )
    if splits is not None and not splits.val_labelled:
        raise DataError(
            f"{job.data}: its images have no labels to measure an artifact by. Put them into class folders."
        )
    source = read_manifest(path).source
    return create_loaders(
        splits, frozen, batch_size, source=source, input_size=job.input_size, num_workers=job.workers
    )


def open_named(job: Job, batch_size: int = EVAL_BATCH) -> Opened:
    """Return a model that has weights, and its data.

    Args:
        job: The job.
        batch_size: Images a batch.

    Raises:
        ConversionError: If its weights would be random ones.
    """
    if not job.has_weights:
        raise ConversionError(f"{job.source} would have random weights. Give --pretrained or --checkpoint FILE.")
    torch.manual_seed(job.seed)
    return measured_by_float(open_job(job, batch_size))


def not_artifact(kind: str, target: str) -> None:
    """Raise if what is to be frozen is an artifact already.

    Args:
        kind: The kind of target.
        target: The path.

    Raises:
        ArtifactError: If it is one.
    """
    if kind == ARTIFACT:
        raise ArtifactError(f"{target} is an artifact already. daqconvert export {target} makes an ONNX file of it.")


def needs_out(out: Path | None, what: str) -> Path:
    """Return where something goes.

    Args:
        out: The `--out` option.
        what: What goes there, for the error.

    Raises:
        ArtifactError: If the user did not say.
    """
    if out is None:
        raise ArtifactError(f"Say where the {what} goes: --out PATH.")
    return out


def calibrated(opened: Opened, policy: Policy) -> nn.Module:
    """Return a quantized copy of a model, calibrated on its data and not trained.

    Args:
        opened: Model and data.
        policy: Which layers get how many bits.
    """
    qmodel: nn.Module = quantize(opened.model, policy=policy, example_inputs=opened.example)
    calibrate(qmodel, opened.loaders.calibration)
    return qmodel.eval()
