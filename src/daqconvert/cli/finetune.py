"""`daqconvert finetune`: the whole job, from a model's name to an ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from daqconvert.cli import options as o
from daqconvert.cli import rundir
from daqconvert.cli.opening import Typed, open_fresh, open_resumed
from daqconvert.cli.output import Output
from daqconvert.cli.processes import together
from daqconvert.cli.running import Started, prepare_float, run
from daqconvert.training import recipe

ModelName = Annotated[
    str | None, typer.Argument(help=f"{o.FORMS}. Default: a small timm network.", show_default=False)
]
Out = Annotated[Path, typer.Option("--out", help="Run directory.")]
Resume = Annotated[bool, o.option("--resume", "Go on with the run in --out.")]
NoOnnx = Annotated[bool, o.option("--no-onnx", "Stop at the artifact; write no ONNX files, take no times.")]
FloatEpochs = Annotated[
    int | None, o.option("--float-epochs", "Epochs in float first, for a model without trained weights.")
]


def finetune_command(
    model: ModelName = None, out: Out = Path("runs/finetune"), pretrained: o.Pretrained = False,
    checkpoint: o.Checkpoint = None, model_arg: o.ModelArgs = None, data: o.Data = None, val: o.Val = None,
    holdout: o.Holdout = None, data_root: o.DataRoot = None, download: o.Download = False,
    input_size: o.InputSize = None, num_classes: o.NumClasses = None, batch_size: o.BatchSize = None,
    workers: o.Workers = 0, policy: o.PolicyFile = None, preset: o.Preset = None, w_bits: o.WBits = None,
    a_bits: o.ABits = None, first: o.First = None, last: o.Last = None, exclude: o.Exclude = None,
    setting: o.Setting = None, recipe_name: o.RecipeName = None, epochs: o.Epochs = None, lr: o.Rate = None,
    quantizer_lr: o.QuantizerRate = None, distill: o.Distill = None, seed: o.Seed = None, fields: o.With = None,
    float_epochs: FloatEpochs = None, overwrite: o.Overwrite = False, resume: Resume = False, no_onnx: NoOnnx = False,
    as_json: o.Json = False,
) -> None:  # fmt: skip
    """Quantize a model, train it, freeze it and deploy it; leave everything in a run directory.

    Without a model and --data: scikit-learn's handwritten digits and a small timm network, trained in float first.
    On several processes: accelerate launch -m daqconvert finetune ..., or torchrun --nproc-per-node N -m daqconvert
    finetune ...
    """
    with Output(as_json).capturing() as output:
        changes = o.recipe_changes(
            fields, epochs=epochs, lr=lr, quantizer_lr=quantizer_lr, distill=distill, seed=seed, batch_size=batch_size
        )
        chosen = None if resume else recipe(recipe_name or "quick", **changes)
        job = o.job_from(
            model, model_arg, pretrained, checkpoint, data, holdout, data_root, download, input_size, num_classes,
            workers, None if chosen is None else chosen.seed, val,
        )  # fmt: skip
        asked = o.read_policy(policy, preset, w_bits, a_bits, first, last, exclude, setting)
        typed = Typed(job, asked, recipe_name, changes, float_epochs)
        with together() as processes:
            processes.from_main(lambda: rundir.prepare(out, overwrite, resume))
            config, opened = open_fresh(typed, chosen) if chosen else open_resumed(out, typed, processes)
            config = processes.from_main(lambda: config)
            opened, float_top1 = prepare_float(out, config, opened, processes, resume=resume)
        run(out, Started(config, opened, float_top1, resume=resume, onnx=not no_onnx), output)
