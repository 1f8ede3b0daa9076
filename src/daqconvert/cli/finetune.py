"""`daqconvert finetune`: the whole job, from a model's name to an ONNX file.

The file follows a run from its start to its end. First, what the user typed becomes a configuration, a model and its
data, and nothing is written before all of it was checked. Then the run directory gets the configuration and the float
weights, which are trained here if the model has none. The quantized model is trained, and its best epoch is frozen and
deployed. Ctrl-C or SIGTERM ends a run with one line that says how to go on, and the exit code that shells expect.
"""

from __future__ import annotations

import dataclasses
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from daqconvert.cli import options as o
from daqconvert.cli import rundir
from daqconvert.cli.deployment import deploy, show_on_page, summary_document, summary_text
from daqconvert.cli.job import Job, Opened, measured_by_float, open_job
from daqconvert.cli.output import Output, fail, say
from daqconvert.cli.processes import ProcessGroup, count, is_main, process_group
from daqconvert.cli.rundir import Config
from daqconvert.convert import apply_plan, plan
from daqconvert.data import check_images
from daqconvert.errors import DataError, TrainingError
from daqconvert.models import copy_model
from daqconvert.report.progress import progress
from daqconvert.sources import load_checkpoint
from daqconvert.spec import Policy
from daqconvert.training import FinetuneResult, Recipe, evaluate, finetune, recipe
from daqconvert.training.rundir import resume_command
from daqconvert.training.signals import Terminated, terminate

ModelName = Annotated[
    str | None, typer.Argument(help=f"{o.FORMS}. Default: a small timm network.", show_default=False)
]
Out = Annotated[Path, typer.Option("--out", help="Run directory.")]
Resume = Annotated[bool, o.option("--resume", "Go on with the run in --out.")]
NoOnnx = Annotated[
    bool, o.option("--no-onnx", "Stop at the artifact; write no ONNX files, take no times. --resume remembers it.")
]
FloatEpochs = Annotated[
    int | None, o.option("--float-epochs", "Epochs in float first, for a model without trained weights.")
]

DEMO_FLOAT_EPOCHS = 10
FLOAT_LR, FLOAT_WEIGHT_DECAY = 3e-3, 0.05
INTERRUPTED, TERMINATED = 130, 143


def finetune_command(
    *, model: ModelName = None, out: Out = Path("runs/finetune"), weights: o.ModelOptions, data: o.DataOptions,
    bits: o.PolicyOptions, training: o.RecipeOptions, float_epochs: FloatEpochs = None, overwrite: o.Overwrite = False,
    resume: Resume = False, no_onnx: NoOnnx = False, as_json: o.Json = False,
) -> None:  # fmt: skip
    """Quantize a model, train it, freeze it and deploy it; leave everything in a run directory.

    Without a model and --data: scikit-learn's handwritten digits and a small timm network, trained in float first.
    On several processes: accelerate launch -m daqconvert finetune ..., or torchrun --nproc-per-node N -m daqconvert
    finetune ...
    """
    with Output(as_json).capturing() as output:
        changes = training.changes(data.batch_size)
        chosen = None if resume else recipe(training.recipe or "quick", **changes)
        job = o.job_from(model, weights, data, None if chosen is None else chosen.seed)
        typed = Typed(job, bits.read(), training.recipe, changes, float_epochs)
        with process_group() as processes:
            processes.from_main(lambda: rundir.prepare(out, overwrite, resume))
            config, opened = open_fresh(typed, chosen) if chosen else open_resumed(out, typed, processes)
            if not resume and (remarks := processes.from_main(lambda: check_images(*opened.images))):
                say(remarks)
            config = processes.from_main(lambda: dataclasses.replace(config, onnx=config.onnx and not no_onnx))
            opened, float_top1 = prepare_float(out, config, opened, processes, resume=resume)
        run(out, Started(config, opened, float_top1, resume=resume), output)


# What was typed is checked and opened.


@dataclass(frozen=True)
class Typed:
    """What the user typed.

    Attributes:
        job: Model and data.
        policy: Which layers get how many bits; None if no option says anything about it.
        recipe: Name or file of the recipe; None if it was not given.
        changes: Fields of the recipe that other options change.
        float_epochs: Epochs in float first; None if it was not given.
    """

    job: Job
    policy: Policy | None
    recipe: str | None
    changes: Mapping[str, Any]
    float_epochs: int | None


def open_fresh(typed: Typed, chosen: Recipe) -> tuple[Config, Opened]:
    """Return the configuration, model and data of a new run; everything is checked, and nothing is written.

    Raises:
        TrainingError: If the model would start from random weights.
        DataError: If the data has no labels and the recipe needs some, or a field of the recipe has no effect on it.
    """
    job, float_epochs = typed.job, typed.float_epochs
    if float_epochs is not None and float_epochs < 0:
        raise TrainingError(f"--float-epochs {float_epochs}: expected 0 or more.")
    torch.manual_seed(job.seed)
    # Processes other than the main one get the weights from it later.
    opened = open_job(job, chosen.batch_size, skeleton=not is_main(), recipe=chosen)
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
    return Config(job, found, chosen, float_epochs, known=opened.known), opened


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


def open_resumed(out: Path, typed: Typed, processes: ProcessGroup) -> tuple[Config, Opened]:
    """Return a run's own configuration, with its model and data; what the user typed has to agree with it.

    `--workers` alone may differ.

    Raises:
        TrainingError: If something does not agree.
    """
    config = processes.from_main(lambda: rundir.read_config(out))
    for item in dataclasses.fields(Job):
        found, stored = (getattr(rundir.absolute(job), item.name) for job in (typed.job, config.job))
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
    skeleton = has_float or not is_main()
    opened = open_job(run_job, config.recipe.batch_size, skeleton, config.recipe, known=config.known)
    if has_float and is_main():
        load_checkpoint(opened.model, out / rundir.FLOAT)
    if typed.policy is not None:
        found = plan(opened.model, policy=typed.policy, example_inputs=opened.example)
        if (found.rows, found.target) != (config.plan.rows, config.plan.target):
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


# The run directory is started, and the float model gets its weights.


def prepare_float(
    out: Path, config: Config, opened: Opened, processes: ProcessGroup, *, resume: bool
) -> tuple[Opened, float | None]:
    """Write configuration and float weights unless they are there, and give the weights to all processes.

    Returns model and data, with labels for the held-out images from here on, and the float model's accuracy on them.
    """

    def write() -> None:
        if not resume:
            rundir.clear(out)
            rundir.write_config(out, config)
        many = f", on {count()} processes" if count() > 1 else ""
        say(f"{config.job.source} on {opened.loaders.description}{many}")
        if not (out / rundir.FLOAT).is_file():
            if config.float_epochs:
                train_float(opened.model, opened.loaders.train, config.float_epochs, config.job.seed)
            rundir.save_float(out, opened)

    def measure() -> float | None:
        return evaluate(opened.model, opened.loaders.val).top1

    with stoppable(out, config.job):
        processes.from_main(write)
        processes.agree(opened.model)
        opened = measured_by_float(opened)
        if not opened.loaders.val_labelled:
            say("no labels to measure by: top-1 is the share of images of which a model has the float model's class")
        found = processes.from_main(measure)
    say(f"float: top-1 {100 * (found or 0):.2f} %")
    return opened, found


def train_float(model: nn.Module, loader: Any, epochs: int, seed: int) -> None:
    """Train a model in place, with AdamW and one cycle of the learning rate, and leave it in evaluation mode.

    Raises:
        TrainingError: If the loss is not a number.
    """
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=FLOAT_LR, weight_decay=FLOAT_WEIGHT_DECAY)
    steps = epochs * len(loader)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, FLOAT_LR, total_steps=steps)
    torch.manual_seed(seed)
    model.train()
    with progress(steps, "training in float") as bar:
        for _ in range(epochs):
            for images, labels in loader:
                loss = nn.functional.cross_entropy(model(images.to(device)), labels.to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                value = loss.item()
                if value != value:
                    raise TrainingError(
                        "Training in float: the loss is not a number. Give --checkpoint or --pretrained."
                    )
                bar.advance(loss=value)
    model.eval()


# The quantized model is trained and deployed.


@dataclass(frozen=True)
class Started:
    """A run that is ready to train.

    Attributes:
        config: Configuration of the run.
        opened: Float model and data of the run.
        float_top1: Accuracy of the float model on the held-out images.
        resume: Whether the run is resumed.
    """

    config: Config
    opened: Opened
    float_top1: float | None
    resume: bool


def run(out: Path, started: Started, output: Output) -> None:
    """Train; then, on the main process, freeze the best epoch, deploy it and show the summary."""
    config, opened = started.config, started.opened
    began = time.perf_counter()
    with stoppable(out, config.job):
        qmodel: nn.Module = apply_plan(copy_model(opened.model), config.plan)
        done = finetune(  # SIGTERM ends it after a step, with a checkpoint
            qmodel, opened.loaders.train, opened.loaders.val, recipe=config.recipe, out_dir=out,
            resume=started.resume, overwrite=not started.resume,
        )  # fmt: skip
        if not is_main():
            return
        say(str(done))
        _deploy(out, started, qmodel, done, began, output)


def _deploy(
    out: Path, started: Started, qmodel: nn.Module, done: FinetuneResult, began: float, output: Output
) -> None:
    config, opened = started.config, started.opened
    top1 = evaluate(qmodel, opened.loaders.val).top1
    deployed = deploy(out, opened, qmodel, onnx=config.onnx)
    seconds = time.perf_counter() - began
    document = summary_document(config, opened.loaders, (started.float_top1, top1), deployed, seconds)
    document |= {"epochs": done.epochs, "best_epoch": done.best_epoch, "stop": done.stop}
    document["files"] = rundir.written(out)
    rundir.write_json(out / rundir.SUMMARY, document)
    show_on_page(out, document)
    output.show(summary_text(document, out), document)
    if deployed.failed:
        fail(f"Trained, and written to {out}, but not all of it: {' '.join(deployed.failed)}", 2)
    if deployed.problems:
        fail(f"{out / rundir.ONNX} does not agree with the frozen model: {'; '.join(deployed.problems)}", 1)


# The run may be stopped.


@contextmanager
def stoppable(out: Path, job: Job) -> Iterator[None]:
    """End the command when Ctrl-C or SIGTERM comes while the block runs, and say how to go on."""
    try:
        with _terminating():
            yield
    except KeyboardInterrupt:
        fail(f"Interrupted. {_go_on(out, job)}", INTERRUPTED)
    except Terminated:
        fail(f"Stopped by SIGTERM. {_go_on(out, job)}", TERMINATED)


@contextmanager
def _terminating() -> Iterator[None]:
    """Raise on SIGTERM while the block runs; a thread other than the main one cannot, and does nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _go_on(out: Path, job: Job) -> str:
    how = ", started by the launcher as before" if count() > 1 else ""
    return f"Go on with: {resume_command(out, job.model)}{how}"
