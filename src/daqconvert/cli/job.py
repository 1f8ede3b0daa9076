"""What a run is made of: model, data and seed, as typed; and the model and loaders that they stand for."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from daqconvert.data import Augmentation, Loaders, Splits, answered_by, create_loaders, open_splits
from daqconvert.data.classes import Classes, published_classes, read_classes, renumbered
from daqconvert.errors import ConversionError, DataError
from daqconvert.sources import Source, build_model, parse_source
from daqconvert.spec.plain_values import from_plain
from daqconvert.training import Recipe

DEMO_MODEL = "timm:test_resnet"
DIGITS = tuple("0123456789")


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
        classes: File of class names, in the order of the model's outputs.
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
    classes: str | None = None
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
class Known:
    """What a run keeps of its model, so that it is the same beside other data.

    Attributes:
        model_args: Keyword arguments that the model was built with; None in runs that keep nothing of all this.
        num_classes: Number of classes of the run's data; 0 without labels.
        class_names: Names of the model's classes, by number; None where labels were numbers alone.
    """

    model_args: Mapping[str, Any] | None = None
    num_classes: int = 0
    class_names: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Opened:
    """A job's model and data.

    Attributes:
        model: The float model, in evaluation mode.
        loaders: The data.
        source: Source of the model.
        model_args: Keyword arguments that the model was built with; they suffice to build it again without weights.
        class_names: Names of the model's classes, by number, where anybody knows them.
    """

    model: nn.Module
    loaders: Loaders
    source: Source
    model_args: dict[str, Any]
    class_names: tuple[str, ...] | None = None

    @property
    def images(self) -> tuple[Any, Any]:
        """The data sets of training and of validation."""
        return self.loaders.train.dataset, self.loaders.val.dataset

    @property
    def known(self) -> Known:
        """What a run keeps of them."""
        return Known(self.model_args, self.loaders.num_classes, self.class_names)

    @property
    def example(self) -> Tensor:
        """One image of zeros, `(1, C, H, W)`, where the model is."""
        return torch.zeros(1, *self.loaders.input_size, device=next(self.model.parameters()).device)

    @property
    def artifact_source(self) -> dict[str, Any]:
        """Arguments of `save`: the names of the classes, and the source from which `load` builds the model itself.

        An artifact may not name every source, and a name with control characters is none to print.
        """
        names = self.class_names or ()
        found: dict[str, Any] = {"classes": names} if names and all(map(str.isprintable, names)) else {}
        if self.source.is_trusted_name:
            found |= {"source": str(self.source), "source_kwargs": self.model_args}
        return found


def open_job(
    job: Job, batch_size: int, skeleton: bool = False, recipe: Recipe | None = None, *,
    known: Known | None = None, labels: bool = True,
) -> Opened:  # fmt: skip
    """Build a job's model and open its data, whose classes are mapped to those of the model.

    A `skeleton` is built without published weights and without the checkpoint, because it gets other weights later.
    The recipe gives the augmentation of training images, and says whether anything is learned from labels; without a
    recipe nothing is, and published weights keep all their classes. `known` is what a run kept of its model. Without
    `labels` the images alone count, whatever their classes.

    Raises:
        ConversionError: If the model cannot be built.
        DataError: If the data cannot be read or has a class that the model does not know, or nothing says which is
            which.
    """
    splits = _splits(job, known is not None or job.classes is not None)
    taught = recipe is None or recipe.distill == 1.0
    arguments = dict(job.model_args) | _defaults(job, splits, taught)
    if known is not None and known.model_args is not None:
        arguments = dict(known.model_args)
    model = build_model(
        job.source,
        pretrained=job.pretrained and not skeleton,
        checkpoint=None if skeleton else job.checkpoint,
        **arguments,
    )
    model.eval()
    own = partial(
        create_loaders,
        model=model,
        batch_size=batch_size,
        source=str(job.source),
        input_size=job.input_size,
        augment=True if recipe is None else _augmentation(recipe),
        num_workers=job.workers,
        seed=job.seed,
    )
    loaders = own(splits)
    count = outputs_of(model, loaders.input_size)
    classes = _classes_of(job, model, count, known, loaders.class_names)
    if labels:
        _check_classes(job, classes, count, loaders, taught=taught and recipe is not None)
        if splits is not None and classes is not None:
            loaders = own(renumbered(splits, classes))
    # Of a model that was trained elsewhere, images whose classes were not mapped say nothing about its outputs.
    strange = classes is not None and not (labels or skeleton)
    names = classes.names if classes is not None and (classes.names or strange) else loaders.class_names
    return Opened(model.to(_device()), loaders, job.source, arguments, names)


def outputs_of(model: nn.Module, image: tuple[int, int, int]) -> int | None:
    """Return the number of classes that a model, in evaluation mode, has outputs for; None if they are no logits.

    `image` is the size of an image; the model is asked with one, unless it says the number itself.
    """
    count = getattr(model, "num_classes", None)
    if isinstance(count, int):
        return count
    where = next(iter(model.parameters()), torch.zeros(())).device
    try:
        with torch.no_grad():
            outputs = model(torch.zeros(1, *image, device=where))
    except Exception:  # NOTE: any error of the user's model; it comes again, and is told, where the model is measured
        return None
    return outputs.shape[1] if isinstance(outputs, Tensor) and outputs.dim() > 1 else None


def classes_of_file(job: Job, count: int | None) -> Classes | None:
    """Return the classes that the user's file names; None without one.

    Raises:
        DataError: If it does not name as many as the model has.
    """
    if job.classes is None:
        return None
    names = read_classes(job.classes)
    if count is not None and count != len(names):
        raise DataError(f"--classes {job.classes}: it names {len(names)} classes, the model has {count}.")
    return Classes(len(names), names, owner=job.classes)


def _classes_of(
    job: Job, model: nn.Module, count: int | None, known: Known | None, names: tuple[str, ...] | None
) -> Classes | None:
    """Return the classes of a model's outputs; None where the data, with its `names`, decides: the head is new."""
    found = classes_of_file(job, count)
    if found is not None or count is None:
        return found
    published = published_classes(model, job.source, count)
    if known is not None:
        if published is not None and known.class_names in (None, published.names):
            return published
        forgotten = "the run, which was made before class names were kept,"
        owner = forgotten if known.model_args is None else "the run"
        return Classes(count, known.class_names, numbers=known.num_classes > 0, owner=owner)
    if job.checkpoint is None and job.source.kind != "import":
        config = getattr(model, "pretrained_cfg", None) or {}
        if not job.pretrained or (published is None and count != config.get("num_classes")):
            return None
        return published or Classes(count, owner=str(job.source))
    fits = published is not None and names is not None and all(published.number(name) is not None for name in names)
    return published if fits else Classes(count, owner=str(job.source))


def remembered(job: Job, recipe: Recipe) -> Known:
    """Return what a run did not keep, from its own data if that is still there.

    Runs that were made before class names were kept had their classes numbered in the order of this data.
    """
    try:
        splits = _splits(job, known=False)
    except DataError:
        return Known()
    arguments = dict(job.model_args) | _defaults(job, splits, recipe.distill == 1.0)
    if splits is None:
        return Known(arguments, len(DIGITS), DIGITS)
    return Known(arguments, splits.num_classes, splits.class_names)


def measured_by_float(opened: Opened) -> Opened:
    """Return the same model and data; held-out images without labels get the float model's answers as labels."""
    return dataclasses.replace(opened, loaders=answered_by(opened.model, opened.loaders))


def _augmentation(recipe: Recipe) -> Augmentation:
    return Augmentation(recipe.augment, recipe.color_jitter, recipe.random_erasing, recipe.crop_scale)


def _check_classes(job: Job, classes: Classes | None, count: int | None, loaders: Loaders, *, taught: bool) -> None:
    names = None if job.data is None else loaders.class_names
    known = classes is not None and all(classes.number(name) is not None for name in names or ())
    if taught and names is not None and count not in (None, len(names)) and not known:
        raise DataError(
            f"{job.source} has {count} classes, the folders {len(names)}. Training towards the float model alone "
            f"(distill = 1) keeps its classes: name all {count} folders, give a --checkpoint of a model with "
            f"{len(names)} classes, or images without class folders."
        )
    if count is not None and count < loaders.num_classes and (classes is None or not classes.names):
        need = loaders.num_classes
        remedy = f"Give --model-arg num_classes={need}"
        if job.source.kind == "import":
            remedy = f"Let it return a model with {need} outputs"
        raise DataError(f"{job.source} has {count} classes, its data {need}. {remedy}.")


def _splits(job: Job, known: bool) -> Splits | None:
    if job.data is None:
        others = (job.holdout, job.num_classes, job.data_root, job.val, job.classes)
        if job.download or any(value is not None for value in others):
            raise DataError(
                "The digits have their own split and ten classes. Give --data, or no other option on data."
            )
        return None
    return open_splits(job.data, job.holdout, job.seed, job.data_root, job.download, job.num_classes, job.val, known)


def _defaults(job: Job, splits: Splits | None, taught: bool) -> dict[str, Any]:
    """Return the builder's arguments that follow from the data; none that the user gave, none for a user's builder."""
    if job.source.kind == "import":
        return {}
    found: dict[str, Any] = {}
    named = splits is None or splits.class_names is not None or not (job.pretrained or job.checkpoint)
    named = named and not (taught and job.pretrained)  # without labels a new head would stay random
    classes = job.num_classes or (10 if splits is None else splits.num_classes)
    classes = classes if job.classes is None else len(read_classes(job.classes))
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
    return from_plain(Job, values, f"{where}: job", error=ConversionError, later=("classes",))


def known_from_dict(values: object, where: str | Path) -> Known:
    """Return what a run kept of its model, from its configuration.

    Raises:
        ConversionError: If the values do not describe it.
    """
    return from_plain(Known, values, f"{where}: known", error=ConversionError)
