"""`daqconvert plan`: which layers get how many bits, and why; nothing is converted."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor, nn

from daqconvert.artifact import read_manifest
from daqconvert.artifact.manifest import MANIFEST
from daqconvert.cli import options as o
from daqconvert.cli import rundir
from daqconvert.cli.output import Output
from daqconvert.cli.targets import ARTIFACT, MODEL, kind_of, refuse
from daqconvert.convert import plan
from daqconvert.data import input_config
from daqconvert.policy.plan_json import plan_to_dict
from daqconvert.report.tables import plan_table, render
from daqconvert.sources import build_model
from daqconvert.spec import Plan

Target = Annotated[str, typer.Argument(help=f"A model ({o.FORMS}), a run directory or an artifact.")]


def plan_command(
    target: Target, model_arg: o.ModelArgs = None, input_size: o.InputSize = None, policy: o.PolicyFile = None,
    preset: o.Preset = None, w_bits: o.WBits = None, a_bits: o.ABits = None, first: o.First = None,
    last: o.Last = None, exclude: o.Exclude = None, setting: o.Setting = None, as_json: o.Json = False,
) -> None:  # fmt: skip
    """Print a row for every convolution and linear layer: its bits and the rule that decided, or why it is left alone.

    Without an option on bits, 4 for weights and inputs. A run directory or artifact shows the plan it was made with.
    """
    with Output(as_json).capturing() as output:
        kind = kind_of(target)
        if kind == MODEL:
            asked = o.read_policy(policy, preset, w_bits, a_bits, first, last, exclude, setting) or o.default_policy()
            model = build_model(target, **o.pairs(model_arg, "--model-arg"))
            found = plan(model, policy=asked, example_inputs=example_image(model, target, input_size))
        else:
            refuse(
                kind, model_arg=model_arg, input_size=input_size, policy=policy, preset=preset, w_bits=w_bits,
                a_bits=a_bits, first=first, last=last, exclude=exclude, set=setting,
            )  # fmt: skip
            found = stored_plan(Path(target), kind)
        document = {
            **plan_to_dict(found), "target": target, "macs": found.macs, "bytes": found.bytes,
            "float_bytes": found.float_bytes,
        }  # fmt: skip
        output.show(render(plan_table(found)), document)


def stored_plan(path: Path, kind: str) -> Plan:
    """Return the plan of a run or artifact, with the signs that calibration chose where it got so far.

    Args:
        path: The directory.
        kind: `"run"` or `"artifact"`.
    """
    artifact = path if kind == ARTIFACT else path / rundir.ARTIFACT
    return read_manifest(artifact).plan if (artifact / MANIFEST).is_file() else rundir.read_config(path).plan


def example_image(model: nn.Module, source: str, side: int | None) -> Tensor | None:
    """Return one image of the size that a model takes, or None where nobody knows it.

    Args:
        model: The model.
        source: Where it came from.
        side: Height and width that the user asked for.
    """
    config = input_config(model, source)
    if config is None and side is None:
        return None
    channels, height, width = config.input_size if config is not None else (3, 0, 0)
    size = (channels, side, side) if side is not None else (channels, height, width)
    return torch.rand(1, *size, generator=torch.Generator().manual_seed(0))
