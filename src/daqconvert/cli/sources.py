"""The source that a command is given: a run directory, an artifact, or a model by name; and how each is opened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from daqconvert.artifact import load, read_manifest
from daqconvert.artifact.manifest import MANIFEST
from daqconvert.calibration import calibrate
from daqconvert.cli import rundir
from daqconvert.cli.job import Job, Opened, classes_of_file, measured_by_float, open_job, outputs_of
from daqconvert.cli.options import given
from daqconvert.convert import quantize
from daqconvert.data import Classes, Loaders, create_loaders, input_config, open_splits, published_classes, renumbered
from daqconvert.errors import ArtifactError, ConversionError, DataError, PolicyError
from daqconvert.sources import build_model
from daqconvert.spec import Policy

EVAL_BATCH = 64
RUN, ARTIFACT, MODEL = "run", "artifact", "model"


def kind_of(source: str) -> str:
    """Return `"run"`, `"artifact"` or `"model"`; a source that is no existing path is taken for a model's name.

    Raises:
        ConversionError: If it is an existing path, but neither a run nor an artifact.

    Example:
        >>> kind_of("resnet18")
        'model'
    """
    path = Path(source)
    if not path.exists():
        return MODEL
    if rundir.is_run(path):
        return RUN
    if (path / MANIFEST).is_file():
        return ARTIFACT
    raise ConversionError(
        f"{source}: neither a run directory (no {rundir.CONFIG}) nor an artifact (no {MANIFEST}). Give one of them, "
        "or a model's name."
    )


def refuse(kind: str, *groups: Any, **options: Any) -> None:
    """Raise if the user gave an option that has no effect on this kind of source.

    `groups` are groups of such options, `options` are the values of single ones by name.

    Raises:
        PolicyError: If there is one; names the first.
    """
    typed: dict[str, Any] = {}
    for group in groups:
        typed |= given(group)
    for name, value in (typed | options).items():
        if value is not None and value is not False and value != []:
            article = "an" if kind == ARTIFACT else "a"
            raise PolicyError(
                f"--{name.replace('_', '-')} has no effect on {article} {kind}: what it was made of is fixed."
            )


def needs_out(out: Path | None, what: str) -> Path:
    """Return the path that `--out` names, where there is no default.

    Raises:
        ArtifactError: If the user did not give it.
    """
    if out is None:
        raise ArtifactError(f"Say where the {what} goes: --out PATH.")
    return out


def open_named(job: Job, batch_size: int = EVAL_BATCH, *, labels: bool = False) -> Opened:
    """Build the model that a job names, with trained weights, and open its data; with `labels`, mapped to its classes.

    Raises:
        ConversionError: If the weights would be random.
        DataError: With `labels`, if the data has a class that the model does not know.
    """
    if not job.has_weights:
        raise ConversionError(f"{job.source} would have random weights. Give --pretrained or --checkpoint FILE.")
    torch.manual_seed(job.seed)
    return measured_by_float(open_job(job, batch_size, labels=labels))


def calibrated(opened: Opened, policy: Policy) -> nn.Module:
    """Return a quantized copy of a model, calibrated on its data and not trained."""
    qmodel: nn.Module = quantize(opened.model, policy=policy, example_inputs=opened.example)
    calibrate(qmodel, opened.loaders.calibration, mode="eval")  # nothing is trained afterwards
    return qmodel.eval()


def load_artifact(path: Path, typed: str | None) -> nn.Module:
    """Return the frozen model of an artifact; `typed` is `--model`, a model to load it into, or None.

    Raises:
        ArtifactError: If neither the artifact nor the user says what to load it into.
    """
    manifest = read_manifest(path)
    if manifest.source is None and typed is None:
        raise ArtifactError(f"{path}: it does not say how to build its {manifest.model}. Add --model module:function.")
    skeleton = None if typed is None else build_model(typed)
    return load(path, model=skeleton).eval()


def loaders_of(path: Path, frozen: nn.Module, job: Job, batch_size: int, *, labels: bool = False) -> Loaders:
    """Return the data that the user named, with images as the model of an artifact takes them.

    With `labels`, its classes are mapped to the artifact's by name.

    Raises:
        DataError: If the images have no labels, or with `labels` a class that the artifact does not know.
    """
    splits = None
    if job.data is not None:
        splits = open_splits(
            job.data, job.holdout, job.seed, job.data_root, job.download, job.num_classes, known=labels
        )
        if not splits.val_labelled:
            raise DataError(
                f"{job.data}: its images have no labels to measure an artifact by. Put them into class folders."
            )
    manifest = read_manifest(path)
    size, side, workers = batch_size, job.input_size, job.workers
    loaders = create_loaders(splits, frozen, size, source=manifest.source, input_size=side, num_workers=workers)
    count = outputs_of(frozen, loaders.input_size)
    if not labels or count is None:
        return loaders
    names = None if manifest.classes is None else tuple(manifest.classes)
    classes = classes_of_file(job, count)
    if classes is None and names is None:
        classes = published_classes(frozen, manifest.source, count)
    classes = classes or Classes(count, names, owner=str(path))
    if count < loaders.num_classes and (splits is None or not classes.names):
        raise DataError(
            f"{path}: its model has {count} classes, the data {loaders.num_classes}: {loaders.description}."
        )
    if splits is None:
        return loaders
    splits = renumbered(splits, classes)
    return create_loaders(splits, frozen, size, source=manifest.source, input_size=side, num_workers=workers)


def data_changes(job: Job) -> dict[str, Any]:
    """Return the fields on data that the user gave, to replace those of a run's job."""
    names = ("data", "holdout", "data_root", "download", "input_size", "num_classes", "classes", "workers")
    default = Job()
    found = {name: getattr(job, name) for name in names if getattr(job, name) != getattr(default, name)}
    return found | ({"val": None} if "data" in found else {})  # the run's --val belongs to the run's own data


def example_image(model: nn.Module, source: str, side: int | None) -> Tensor | None:
    """Return one random image of the size that a model takes, or of `side` pixels; None where no size is known."""
    config = input_config(model, source or None)
    if config is None and side is None:
        return None
    channels, height, width = config.input_size if config is not None else (3, 0, 0)
    size = (channels, side, side) if side is not None else (channels, height, width)
    return torch.rand(1, *size, generator=torch.Generator().manual_seed(0))
