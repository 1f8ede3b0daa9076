"""What a run is made of: model, data and seed, as typed; and the model and loaders that they stand for."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from daqconvert.data import Augmentation, Loaders, Splits, answered_by, create_loaders, open_splits
from daqconvert.errors import ConversionError, DataError
from daqconvert.sources import Source, build_model, parse_source
from daqconvert.spec.plain_values import from_plain
from daqconvert.training import Recipe

DEMO_MODEL = "timm:test_resnet"


@dataclass(frozen=True)
class Job:
    """A model and its data, by name.

    Attributes:
        model: Source string; None for the small network that goes with the digits.
        model_args: Keyword arguments of its builder.
        pretrained: Whether published weights are wanted.
        checkpoint: File of float weights.
        data: Folder, parquet file or data set name; None for the digits.
        val: Folder or parquet file to evaluate on, instead of a part of `data`.
        holdout: Share or number of images held out.
        data_root: Folder of a timm data set.
        download: Whether a timm data set may be downloaded.
        input_size: Height and width of the images.
        num_classes: Number of classes.
        workers: Processes that decode images.
        seed: Seed of everything random.
    """

    model: str | None = None
    model_args: Mapping[str, Any] = field(default_factory=dict)
    pretrained: bool = False
    checkpoint: str | None = None
    data: str | None = None
    val: str | None = None
    holdout: float | int | None = None
    data_root: str | None = None
    download: bool = False
    input_size: int | None = None
    num_classes: int | None = None
    workers: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.workers < 0 or self.seed < 0:
            raise DataError("--workers and --seed: expected 0 or more.")
        if self.input_size is not None and self.input_size < 1:
            raise DataError(f"--input-size {self.input_size}: expected 1 or more.")
        if self.model is None and (self.pretrained or self.checkpoint or self.model_args or self.data or self.val):
            raise ConversionError("Name a model: without one, there are only the digits and a small network for them.")

    @property
    def source(self) -> Source:
        """The model's source."""
        return parse_source(self.model or DEMO_MODEL)

    @property
    def has_weights(self) -> bool:
        """Whether the model starts from trained weights; a model from an import path is taken to have them."""
        return self.pretrained or self.checkpoint is not None or self.source.kind == "import"


@dataclass(frozen=True)
class Opened:
    """A job's model and data.

    Attributes:
        model: The float model, in evaluation mode.
        loaders: The data.
        source: Source of the model.
        model_args: Keyword arguments that the model was built with; they suffice to build it again without weights.
    """

    model: nn.Module
    loaders: Loaders
    source: Source
    model_args: dict[str, Any]

    @property
    def example(self) -> Tensor:
        """One image of zeros, `(1, C, H, W)`, where the model is."""
        return torch.zeros(1, *self.loaders.input_size, device=next(self.model.parameters()).device)

    @property
    def artifact_source(self) -> dict[str, Any]:
        """Arguments of `save` that let `load` build the model itself; empty if an artifact may not name its source."""
        if not self.source.is_trusted_name:
            return {}
        return {"source": str(self.source), "source_kwargs": self.model_args}


def open_job(job: Job, batch_size: int, skeleton: bool = False, recipe: Recipe | None = None) -> Opened:
    """Build a job's model and open its data.

    A `skeleton` is built without published weights and without the checkpoint, because it gets other weights later.
    The recipe gives the augmentation of training images, and says whether anything is learned from labels.

    Raises:
        ConversionError: If the model cannot be built.
        DataError: If the data cannot be read, or has more classes than the model.
    """
    splits = _splits(job)
    taught = recipe is not None and recipe.distill == 1.0
    arguments = dict(job.model_args) | _defaults(job, splits, taught)
    model = build_model(
        job.source,
        pretrained=job.pretrained and not skeleton,
        checkpoint=None if skeleton else job.checkpoint,
        **arguments,
    )
    model.eval()
    loaders = create_loaders(
        splits,
        model,
        batch_size,
        source=str(job.source),
        input_size=job.input_size,
        augment=True if recipe is None else _augmentation(recipe),
        num_workers=job.workers,
        seed=job.seed,
    )
    _check_classes(job, model, loaders, taught)
    return Opened(model.to(_device()), loaders, job.source, arguments)


def measured_by_float(opened: Opened) -> Opened:
    """Return the same model and data; held-out images without labels get the float model's answers as labels."""
    return dataclasses.replace(opened, loaders=answered_by(opened.model, opened.loaders))


def _augmentation(recipe: Recipe) -> Augmentation:
    return Augmentation(recipe.augment, recipe.color_jitter, recipe.random_erasing, recipe.crop_scale)


def _check_classes(job: Job, model: nn.Module, loaders: Loaders, taught: bool) -> None:
    outputs = getattr(model, "num_classes", None)
    if not isinstance(outputs, int):
        return
    if outputs < loaders.num_classes:
        raise DataError(
            f"{job.source} has {outputs} classes, its data {loaders.num_classes}. Give --model-arg "
            f"num_classes={loaders.num_classes}."
        )
    names = loaders.class_names
    if taught and names is not None and outputs != len(names) and job.data is not None:
        raise DataError(
            f"{job.source} has {outputs} classes, the folders {len(names)}. Training towards the float model alone "
            f"(distill = 1) keeps its classes: name all {outputs} folders, give a --checkpoint of a model with "
            f"{len(names)} classes, or images without class folders."
        )


def _splits(job: Job) -> Splits | None:
    if job.data is None:
        others = (job.holdout, job.num_classes, job.data_root, job.val)
        if job.download or any(value is not None for value in others):
            raise DataError(
                "The digits have their own split and ten classes. Give --data, or no other option on data."
            )
        return None
    return open_splits(job.data, job.holdout, job.seed, job.data_root, job.download, job.num_classes, job.val)


def _defaults(job: Job, splits: Splits | None, taught: bool) -> dict[str, Any]:
    """Return the builder's arguments that follow from the data; none that the user gave, none for a user's builder."""
    if job.source.kind == "import":
        return {}
    found: dict[str, Any] = {}
    named = splits is None or splits.class_names is not None or not (job.pretrained or job.checkpoint)
    named = named and not (taught and job.pretrained)  # without labels a new head would stay random
    classes = job.num_classes or (10 if splits is None else splits.num_classes)
    if "num_classes" not in job.model_args and classes and (named or job.num_classes):
        found["num_classes"] = classes  # else the numbers may be those of the published model, which keeps its head
    fresh = not (job.pretrained or job.checkpoint)
    if splits is None and fresh and job.source.kind == "timm" and "in_chans" not in job.model_args:
        found["in_chans"] = 1
    return found


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def job_from_dict(values: object, where: str | Path) -> Job:
    """Return the job that a run directory's configuration holds.

    Raises:
        ConversionError: If the values do not describe a job.
    """
    return from_plain(Job, values, f"{where}: job", error=ConversionError)
