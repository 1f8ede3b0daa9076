"""A run directory: the names of its files, its configuration, and how a command opens it again."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from daqconvert.cli.job import (
    Job,
    Known,
    Opened,
    job_from_dict,
    known_from_dict,
    measured_by_float,
    open_job,
    remembered,
)
from daqconvert.convert import apply_plan
from daqconvert.data.splits import DATA_ROOT
from daqconvert.errors import ConversionError, TrainingError
from daqconvert.files import replacing, write_text
from daqconvert.policy.plan_json import plan_from_dict, plan_to_dict
from daqconvert.sources import load_checkpoint, parse_source
from daqconvert.spec import Plan
from daqconvert.training import Recipe, load_weights
from daqconvert.training.recipes import completed
from daqconvert.training.rundir import PAGE, RunDirectory, resume_command
from daqconvert.version import __version__

RUN = "run"
CONFIG, FLOAT, SUMMARY = "config.json", "float.safetensors", "summary.json"
ARTIFACT, ONNX, FLOAT_ONNX = "artifact", "model.onnx", "float.onnx"
HINT = "Free some space or choose another --out."
BEST, LAST = "best.safetensors", "last.safetensors"
LOGS = {"report": PAGE, "log": "log.csv", "steps": "steps.csv", "warnings": "warnings.jsonl"}
OWN = (CONFIG, FLOAT, SUMMARY, ARTIFACT, ONNX, FLOAT_ONNX)


@dataclass(frozen=True)
class Config:
    """What `config.json` holds.

    Attributes:
        job: Model and data.
        plan: Which layers get how many bits.
        recipe: How the quantized model is trained.
        float_epochs: Epochs that the float model is trained first.
        onnx: Whether ONNX files are made.
        known: The model's arguments and class names; None in runs that were made before these were kept.
    """

    job: Job
    plan: Plan
    recipe: Recipe
    float_epochs: int
    onnx: bool = True
    known: Known | None = None


def is_run(path: str | Path) -> bool:
    """Whether a path is a run directory."""
    return (Path(path) / CONFIG).is_file()


def prepare(path: Path, overwrite: bool, resume: bool) -> None:
    """Refuse a directory that is in use, unless the user says what to do with it; nothing is changed here.

    Raises:
        TrainingError: If it is in use, or no directory.
    """
    if overwrite and resume:
        raise TrainingError("--overwrite and --resume: give one of them.")
    if path.exists() and not path.is_dir():
        raise TrainingError(f"{path} is a file; expected a directory for the run. Choose another with --out.")
    if resume and not is_run(path):
        raise TrainingError(f"{path}: no run to resume, it has no {CONFIG}.")
    if path.is_dir() and any(path.iterdir()) and not (overwrite or resume):
        hint = "Add --overwrite to replace it, --resume to go on" if is_run(path) else "Add --overwrite to use it"
        raise TrainingError(f"{path} exists and is not empty. {hint}, or choose another with --out.")


def clear(path: Path) -> None:
    """Remove what an earlier run wrote; other files stay."""
    if path.is_dir():
        RunDirectory(path, overwrite=True).clear()
    for name in OWN:
        entry = path / name
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink(missing_ok=True)


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of all files in a folder."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def written(path: Path) -> dict[str, str]:
    """Return the names of what a run wrote for people to read: its page, its logs, its warnings."""
    found = {key: name for key, name in LOGS.items() if (path / name).is_file()}
    return found | ({"tensorboard": "tensorboard"} if (path / "tensorboard").is_dir() else {})


def write_config(path: Path, config: Config) -> None:
    """Write `config.json`, making the directory if need be."""
    path.mkdir(parents=True, exist_ok=True)
    job = absolute(config.job)
    if job.data is not None and job.data_root is None and not Path(job.data).exists():
        job = dataclasses.replace(job, data_root=str(Path(DATA_ROOT).absolute()))  # of a data set that has a name
    document = {
        "daqconvert": __version__,
        "job": dataclasses.asdict(job),
        "recipe": config.recipe.to_dict(),
        "float_epochs": config.float_epochs,
        "onnx": config.onnx,
        "known": None if config.known is None else dataclasses.asdict(config.known),
        "plan": plan_to_dict(config.plan),
    }
    write_json(path / CONFIG, document)


def absolute(job: Job) -> Job:
    """Return a job whose files and folders are named from the root, so that it is the same job in any folder."""
    found: dict[str, Any] = {
        key: str(Path(value).absolute())
        for key in ("checkpoint", "data", "val", "data_root", "classes")
        if (value := getattr(job, key)) is not None and Path(value).exists()
    }
    return dataclasses.replace(job, **found)


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write a JSON file in one go."""
    write_text(path, json.dumps(document, indent=2, ensure_ascii=False) + "\n", TrainingError, HINT)


def read_json(path: Path) -> Any:
    """Return what a JSON file holds.

    Raises:
        TrainingError: If it is missing or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TrainingError(f"{path} could not be read ({error}).") from error


def read_config(path: Path) -> Config:
    """Return what `config.json` holds.

    Raises:
        TrainingError: If it is damaged.
    """
    found = read_json(path / CONFIG)
    try:
        job = job_from_dict(found["job"], path / CONFIG)
        known = found.get("known")
        known = None if known is None else known_from_dict(known, path / CONFIG)
        plan, recipe = plan_from_dict(found["plan"]), Recipe(**completed(found["recipe"]))
        onnx = bool(found.get("onnx", True))
        return Config(job, plan, recipe, int(found["float_epochs"]), onnx=onnx, known=known)
    except (KeyError, TypeError) as error:
        raise TrainingError(f"{path / CONFIG} is damaged: {error}.") from error


def allow_code(job: Job, typed: str | None, where: str | Path) -> Job:
    """Return a run's job if it may be built: an import path runs code, so the user has to type it again as `--model`.

    Raises:
        ConversionError: If the model is code that the user did not name, or the user named another model.
    """
    if typed is not None and job.source != parse_source(typed):
        raise ConversionError(f"--model {typed}: the model of {where} is {job.source}.")
    if job.source.kind == "import" and typed is None:
        raise ConversionError(
            f"{where}: its model is {job.source}, code to be imported. If you trust it, add --model {job.source}."
        )
    return job


def open_run(
    path: Path, typed: str | None, batch_size: int, changes: Mapping[str, Any] | None = None, *, labels: bool = False
) -> tuple[Config, Opened]:
    """Return the configuration of a run, its data and its float model with the run's own float weights.

    `typed` is the `--model` option; `changes` are fields of the job, those on data, with other values for now. With
    `labels`, the classes of the data are mapped to the run's by name.

    Raises:
        TrainingError: If the run has no float weights yet.
        DataError: With `labels`, if the data has a class that the run does not know.
    """
    config = read_config(path)
    job = dataclasses.replace(allow_code(config.job, typed, path), **changes or {})
    if not (path / FLOAT).is_file():
        raise TrainingError(f"{path}: it has no {FLOAT} yet. Go on with: {resume_command(path, job.model)}")
    known = config.known
    if known is None and changes:
        known = remembered(config.job, config.recipe)
    opened = open_job(job, batch_size, skeleton=True, recipe=config.recipe, known=known, labels=labels)
    load_checkpoint(opened.model, path / FLOAT)
    return config, measured_by_float(opened)


def quantized_model(path: Path, config: Config, opened: Opened) -> Any:
    """Return the quantized model that a run ends with, in evaluation mode; the float model is converted in place.

    That is the model of its best epoch, or of its last if the recipe says so.

    Raises:
        TrainingError: If no epoch was finished.
    """
    file = path / (BEST if config.recipe.final_epoch == "best" else LAST)
    if not file.is_file():
        raise TrainingError(f"{path}: it has no {file.name} yet. Go on with: {resume_command(path, config.job.model)}")
    qmodel = apply_plan(opened.model, config.plan)
    load_weights(qmodel, file)
    return qmodel.eval()


def save_float(path: Path, opened: Opened) -> None:
    """Write the float model's state dict into the run directory."""
    from safetensors.torch import save_file

    tensors = {name: value.detach().cpu().clone().contiguous() for name, value in opened.model.state_dict().items()}
    with replacing(path / FLOAT, TrainingError, HINT) as temporary:
        save_file(tensors, str(temporary))  # clones: a tied weight is written under each of its names
