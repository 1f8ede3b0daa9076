"""What `finetune` does once everything is checked: float weights, training, freezing, deployment, summary."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from daqconvert.cli import rundir
from daqconvert.cli.deployment import deploy
from daqconvert.cli.float_training import train_float
from daqconvert.cli.interrupts import stoppable, training
from daqconvert.cli.job import Opened, measured_by_float
from daqconvert.cli.output import Output, fail, say
from daqconvert.cli.processes import Together, count, is_main
from daqconvert.cli.rundir import Config
from daqconvert.cli.summary import summary_document, summary_text
from daqconvert.convert import apply_plan
from daqconvert.models import copy_model
from daqconvert.training import FinetuneResult, evaluate, finetune, load_weights


@dataclass(frozen=True)
class Started:
    """A run that can train.

    Attributes:
        config: Its configuration.
        opened: Its float model and data.
        float_top1: Accuracy of the float model on the held-out images.
        resume: Whether it goes on.
        onnx: Whether ONNX files are wanted.
    """

    config: Config
    opened: Opened
    float_top1: float | None
    resume: bool
    onnx: bool


def prepare_float(
    out: Path, config: Config, opened: Opened, processes: Together, *, resume: bool
) -> tuple[Opened, float | None]:
    """Write the configuration and the float weights, and give them to all processes; return the float accuracy.

    Args:
        out: The run directory.
        config: What is run.
        opened: Its float model and data.
        processes: Those of the run.
        resume: Whether the run is there already.
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


def run(out: Path, started: Started, output: Output) -> None:
    """Train; then, on the main process, freeze the best epoch, deploy it and say what came out.

    Args:
        out: The run directory.
        started: What is run.
        output: Where the summary goes.
    """
    config, opened = started.config, started.opened
    began = time.perf_counter()
    with stoppable(out, config.job):
        qmodel: nn.Module = apply_plan(copy_model(opened.model), config.plan)
        with training():
            done = finetune(
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
    load_weights(qmodel, out / rundir.BEST)
    top1 = evaluate(qmodel, opened.loaders.val).top1
    deployed = deploy(out, opened, qmodel, onnx=started.onnx)
    seconds = time.perf_counter() - began
    document = summary_document(config, opened.loaders, (started.float_top1, top1), deployed, seconds)
    document |= {"epochs": done.epochs, "best_epoch": done.best_epoch, "stop": done.stop}
    document["files"] = rundir.written(out)
    rundir.write_json(out / rundir.SUMMARY, document)
    output.show(summary_text(document, out), document)
    if deployed.problems:
        fail(f"{out / rundir.ONNX} does not agree with the frozen model: {'; '.join(deployed.problems)}", 1)
