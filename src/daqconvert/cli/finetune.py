"""`daqconvert finetune`: the whole job, from a model's name to an ONNX file."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from daqconvert.cli import options as o
from daqconvert.cli import rundir
from daqconvert.cli.deployment import Deployed, deploy
from daqconvert.cli.float_training import train_float
from daqconvert.cli.job import Job, Opened, open_job
from daqconvert.cli.output import Output, fail, say
from daqconvert.cli.rundir import Config
from daqconvert.cli.summary import summary_document, summary_text
from daqconvert.convert import apply_plan, plan
from daqconvert.errors import TrainingError
from daqconvert.modes import copy_model
from daqconvert.spec import Policy
from daqconvert.state_dicts import load_checkpoint
from daqconvert.training import Recipe, evaluate, finetune, load_weights, recipe

DEMO_FLOAT_EPOCHS = 10
ModelName = Annotated[
    str | None, typer.Argument(help=f"{o.FORMS}. Default: a small timm network.", show_default=False)
]
Out = Annotated[Path, typer.Option("--out", help="Run directory.")]
Resume = Annotated[bool, o.option("--resume", "Go on with the run in --out.")]
NoOnnx = Annotated[bool, o.option("--no-onnx", "Stop at the artifact; write no ONNX files, take no times.")]
RecipeName = Annotated[str | None, o.option("--recipe", "quick, paper-cifar10, paper-imagenet or a TOML file.")]
Epochs = Annotated[int | None, o.option("--epochs", "Epochs of finetuning.")]
Rate = Annotated[float | None, o.option("--lr", "Learning rate of the weights.")]
QuantizerRate = Annotated[float | None, o.option("--quantizer-lr", "Learning rate of the quantizers.")]
Distill = Annotated[float | None, o.option("--distill", "Weight of distillation, 0 to 1.")]
Seed = Annotated[int | None, o.option("--seed", "Seed of everything random.")]
FloatEpochs = Annotated[
    int | None, o.option("--float-epochs", "Epochs in float first, for a model without trained weights.")
]


def finetune_command(
    model: ModelName = None, out: Out = Path("runs/finetune"), pretrained: o.Pretrained = False,
    checkpoint: o.Checkpoint = None, model_arg: o.ModelArgs = None, data: o.Data = None, holdout: o.Holdout = None,
    data_root: o.DataRoot = None, download: o.Download = False, input_size: o.InputSize = None,
    num_classes: o.NumClasses = None, batch_size: o.BatchSize = None, workers: o.Workers = 0,
    policy: o.PolicyFile = None, preset: o.Preset = None, w_bits: o.WBits = None, a_bits: o.ABits = None,
    first: o.First = None, last: o.Last = None, exclude: o.Exclude = None, setting: o.Setting = None,
    recipe_name: RecipeName = None, epochs: Epochs = None, lr: Rate = None, quantizer_lr: QuantizerRate = None,
    distill: Distill = None, seed: Seed = None, float_epochs: FloatEpochs = None, overwrite: o.Overwrite = False,
    resume: Resume = False, no_onnx: NoOnnx = False, as_json: o.Json = False,
) -> None:  # fmt: skip
    """Quantize a model, train it, freeze it and deploy it; leave everything in a run directory.

    Without a model and --data: scikit-learn's handwritten digits and a small timm network, trained in float first.
    """
    with Output(as_json).capturing() as output:
        rundir.prepare(out, overwrite, resume)
        job = o.job_from(
            model, model_arg, pretrained, checkpoint, data, holdout, data_root, download, input_size, num_classes,
            workers, seed,
        )  # fmt: skip
        asked = o.read_policy(policy, preset, w_bits, a_bits, first, last, exclude, setting)
        changes = {"epochs": epochs, "lr": lr, "quantizer_lr": quantizer_lr, "distill": distill, "seed": seed}
        changes |= {"batch_size": batch_size}
        changes = {key: value for key, value in changes.items() if value is not None}
        if resume:
            config, opened = _resumed(out, job, asked, recipe_name, changes, float_epochs)
        else:
            chosen = recipe(recipe_name or "quick", **changes)
            config, opened = _fresh(job, asked, chosen, float_epochs)
        _run(out, config, opened, resume=resume, onnx=not no_onnx, output=output)


def _fresh(job: Job, asked: Policy | None, chosen: Recipe, float_epochs: int | None) -> tuple[Config, Opened]:
    """Check and build everything, before anything is written."""
    torch.manual_seed(job.seed)
    opened = open_job(job, chosen.batch_size)
    if float_epochs is None:
        float_epochs = 0 if job.has_weights else DEMO_FLOAT_EPOCHS
        if not job.has_weights and job.model is not None:
            raise TrainingError(
                f"{job.source} would start from random weights. Give --pretrained or --checkpoint FILE, or say how "
                "long to train it in float first: --float-epochs N."
            )
    policy = asked or o.default_policy()
    found = plan(opened.model, policy=policy, example_inputs=opened.example)
    return Config(job, found, chosen, float_epochs), opened


def _resumed(
    out: Path, job: Job, asked: Policy | None, recipe_name: str | None, changes: dict[str, Any],
    float_epochs: int | None,
) -> tuple[Config, Opened]:  # fmt: skip
    """Take the run's own configuration; what the user typed besides has to be the same."""
    config = rundir.read_config(out)
    for item in dataclasses.fields(Job):
        typed, stored = getattr(job, item.name), getattr(config.job, item.name)
        if typed not in (stored, getattr(Job(), item.name)):
            raise TrainingError(f"--resume: the run in {out} has {item.name} {stored!r}, found {typed!r}.")
    if float_epochs not in (None, config.float_epochs):
        raise TrainingError(
            f"--resume: the run in {out} has {config.float_epochs} float epochs, found {float_epochs}."
        )
    run_job = rundir.allow_code(config.job, job.model, out)
    chosen = recipe(recipe_name or config.recipe, **changes)
    has_float = (out / rundir.FLOAT).is_file()
    torch.manual_seed(run_job.seed)
    opened = open_job(run_job, chosen.batch_size, skeleton=has_float)
    if has_float:
        load_checkpoint(opened.model, out / rundir.FLOAT)
    if asked is not None and plan(opened.model, policy=asked, example_inputs=opened.example).rows != config.plan.rows:
        raise TrainingError(f"--resume: the run in {out} has another policy than the one given. Leave it out.")
    return dataclasses.replace(config, recipe=chosen), opened


def _run(out: Path, config: Config, opened: Opened, *, resume: bool, onnx: bool, output: Output) -> None:
    started = time.perf_counter()
    if not resume:
        rundir.clear(out)
        rundir.write_config(out, config)
    try:
        say(f"{config.job.source} on {opened.loaders.description}")
        if not (out / rundir.FLOAT).is_file():
            if config.float_epochs:
                train_float(opened.model, opened.loaders.train, config.float_epochs, config.job.seed)
            rundir.save_float(out, opened)
        float_top1 = evaluate(opened.model, opened.loaders.val).top1
        say(f"float: top-1 {100 * (float_top1 or 0):.2f} %")
        qmodel = apply_plan(copy_model(opened.model), config.plan)
        done = finetune(
            qmodel, opened.loaders.train, opened.loaders.val, recipe=config.recipe, out_dir=out, resume=resume,
            overwrite=not resume,
        )  # fmt: skip
        say(str(done))
        load_weights(qmodel, out / rundir.BEST)
        quantized_top1 = evaluate(qmodel, opened.loaders.val).top1
        deployed = deploy(out, opened, qmodel, onnx=onnx)
    except KeyboardInterrupt:
        fail(f"Interrupted. Go on with: daqconvert finetune --out {out} --resume", 130)
    _finish(out, config, opened, (float_top1, quantized_top1), deployed, time.perf_counter() - started, output)


def _finish(
    out: Path, config: Config, opened: Opened, top1: tuple[float | None, float | None], deployed: Deployed,
    seconds: float, output: Output,
) -> None:  # fmt: skip
    document = summary_document(config, opened.loaders.description, top1, deployed, seconds)
    rundir.write_json(out / rundir.SUMMARY, document)
    output.show(summary_text(document), document)
    if deployed.problems:
        fail(f"{out / rundir.ONNX} does not agree with the frozen model: {'; '.join(deployed.problems)}", 1)
