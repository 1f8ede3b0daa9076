"""How `finetune` begins: what the user typed becomes a configuration, a model and its data; nothing is written yet."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from daqconvert.cli import options as o
from daqconvert.cli import rundir
from daqconvert.cli.job import Job, Opened, open_job
from daqconvert.cli.processes import Together, is_main
from daqconvert.cli.rundir import Config
from daqconvert.convert import plan
from daqconvert.errors import DataError, TrainingError
from daqconvert.sources import load_checkpoint
from daqconvert.spec import Policy
from daqconvert.training import Recipe, recipe

DEMO_FLOAT_EPOCHS = 10


@dataclass(frozen=True)
class Typed:
    """What the user typed.

    Attributes:
        job: Model and data.
        policy: Which layers get how many bits, or None.
        recipe: Its name or file, or None.
        changes: Fields of the recipe.
        float_epochs: Epochs in float first, or None.
    """

    job: Job
    policy: Policy | None
    recipe: str | None
    changes: Mapping[str, Any]
    float_epochs: int | None


def open_fresh(typed: Typed, chosen: Recipe) -> tuple[Config, Opened]:
    """Check and build everything, before anything is written.

    Args:
        typed: What the user typed.
        chosen: The recipe.

    Raises:
        TrainingError: If the model would start from random weights.
        DataError: If the data has no labels and the recipe needs some, or a field of the recipe has no effect on it.
    """
    job, float_epochs = typed.job, typed.float_epochs
    torch.manual_seed(job.seed)
    opened = open_job(job, chosen.batch_size, skeleton=not is_main(), recipe=chosen)  # the others get their weights
    if float_epochs is None:
        float_epochs = 0 if job.has_weights else DEMO_FLOAT_EPOCHS
        if not job.has_weights and job.model is not None:
            raise TrainingError(
                f"{job.source} would start from random weights. Give --pretrained or --checkpoint FILE, or say how "
                "long to train it in float first: --float-epochs N."
            )
    _check_labels(job, opened, chosen, float_epochs)
    for name in opened.loaders.unused:
        if name in typed.changes:
            raise DataError(f"--with {name}: has no effect on {opened.loaders.description}. Leave it out.")
    policy = typed.policy or o.default_policy()
    found = plan(opened.model, policy=policy, example_inputs=opened.example)
    return Config(job, found, chosen, float_epochs), opened


def _check_labels(job: Job, opened: Opened, chosen: Recipe, float_epochs: int) -> None:
    if opened.loaders.labelled:
        return
    if chosen.distill < 1.0:
        raise DataError(
            f"{job.data}: its images have no labels, and recipe {chosen.name} learns from labels (distill = "
            f"{chosen.distill:g}). Add --recipe fewshot or --distill 1, or put the images into one folder a class."
        )
    if float_epochs:
        raise DataError(f"--float-epochs: the images of {job.data} have no labels to train a float model with.")


def open_resumed(out: Path, typed: Typed, processes: Together) -> tuple[Config, Opened]:
    """Take the run's own configuration; what the user typed besides has to be the same, but for `--workers`.

    Args:
        out: The run directory.
        typed: What the user typed.
        processes: Those of the run.

    Raises:
        TrainingError: If something is not the same.
    """
    config = processes.from_main(lambda: rundir.read_config(out))
    for item in dataclasses.fields(Job):
        found, stored = getattr(typed.job, item.name), getattr(config.job, item.name)
        if found not in (stored, getattr(Job(), item.name)) and item.name != "workers":
            raise TrainingError(f"--resume: the run in {out} has {item.name} {stored!r}, found {found!r}.")
    if typed.float_epochs not in (None, config.float_epochs):
        raise TrainingError(
            f"--resume: the run in {out} has {config.float_epochs} float epochs, found {typed.float_epochs}."
        )
    _check_recipe(out, config.recipe, typed)
    run_job = rundir.allow_code(config.job, typed.job.model, out)
    run_job = dataclasses.replace(run_job, workers=typed.job.workers or run_job.workers)
    has_float = (out / rundir.FLOAT).is_file()
    torch.manual_seed(run_job.seed)
    opened = open_job(run_job, config.recipe.batch_size, skeleton=has_float or not is_main(), recipe=config.recipe)
    if has_float and is_main():
        load_checkpoint(opened.model, out / rundir.FLOAT)
    if typed.policy is not None:
        found = plan(opened.model, policy=typed.policy, example_inputs=opened.example)
        if found.rows != config.plan.rows:
            raise TrainingError(f"--resume: the run in {out} has another policy than the one given. Leave it out.")
    return config, opened


def _check_recipe(out: Path, stored: Recipe, typed: Typed) -> None:
    now, then = recipe(typed.recipe or stored, **typed.changes).to_dict(), stored.to_dict()
    problems = [f"{key} {then[key]!r}, found {now[key]!r}" for key in then if key != "name" and now[key] != then[key]]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise TrainingError(
            f"--resume: the run in {out} has {'; '.join(problems[:3])}{more}. A run goes on with its own recipe: "
            "leave that out, or start another run with another --out."
        )
