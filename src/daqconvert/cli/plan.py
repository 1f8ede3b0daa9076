"""`daqconvert plan`: which layers get how many bits, and why; nothing is converted."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import Tensor, nn

from daqconvert.artifact import read_manifest
from daqconvert.artifact.manifest import MANIFEST
from daqconvert.cli import options as o
from daqconvert.cli import rundir
from daqconvert.cli.output import Output
from daqconvert.cli.sources import ARTIFACT, MODEL, example_image, kind_of, refuse
from daqconvert.convert import plan
from daqconvert.errors import PolicyError
from daqconvert.files import write_text
from daqconvert.policy import from_toml
from daqconvert.policy.plan_json import plan_to_dict
from daqconvert.report.tables import plan_table, render
from daqconvert.sources import build_model
from daqconvert.spec import Plan, PlanDiff

STDOUT = Path("-")
SIZES = ("bops", "float_bops", "weight_bytes", "float_bytes", "scale_bytes")
Source = Annotated[str, typer.Argument(help=f"A model ({o.FORMS}), a run directory or an artifact.")]
Toml = Annotated[
    Path | None, o.option("--toml", "Write a policy file that gives this plan again; - for standard output.")
]
Diff = Annotated[
    Path | None, o.option("--diff", "Print what changes with this policy file, or in this run or artifact, instead.")
]


def plan_command(
    *, source: Source, model_arg: o.ModelArg = None, input_size: o.InputSize = None, bits: o.PolicyOptions,
    toml: Toml = None, overwrite: o.Overwrite = False, diff: Diff = None, as_json: o.Json = False,
) -> None:  # fmt: skip
    """Print a row for every convolution and linear layer: its bits and the rule that decided, or why it is left alone.

    Without an option on bits, 4 for weights and inputs. A run directory or artifact shows the plan it was made with.
    """
    with Output(as_json).capturing() as output:
        to_file = _file_to_write(toml, diff, overwrite)
        kind, model = kind_of(source), None
        if kind == MODEL:
            asked = bits.read()
            model = build_model(source, **o.pairs(model_arg, "--model-arg"))
            example = example_image(model, source, input_size)
            found = plan(model, policy=asked or o.default_policy(), example_inputs=example)
        else:
            refuse(kind, model_arg=model_arg, input_size=input_size)
            refuse(kind, bits)
            found, example = stored_plan(Path(source), kind), None
        document, text = plan_document(found, source), render(plan_table(found))
        if toml is not None:
            document["toml"] = found.to_toml()
            text = document["toml"].rstrip("\n") if to_file is None else text
        if diff is not None:
            change = found.diff(_second_plan(diff, model, example))
            document["diff"], text = diff_document(change), str(change)
        if to_file is not None:
            write_text(to_file, document["toml"], PolicyError)
        output.show(text, document)


def plan_document(found: Plan, source: str) -> dict[str, Any]:
    """Return a plan for programs: its JSON form, with the sizes of every row and of all."""
    document = plan_to_dict(found)
    for row, data in zip(found, document["rows"], strict=True):
        data |= {key: getattr(row, key) for key in SIZES}
    totals = dataclasses.asdict(found.totals)
    return {**document, "target": source, **totals, "input_groups": found.input_groups()}


def diff_document(change: PlanDiff) -> dict[str, Any]:
    """Return the difference of two plans for programs."""
    return {
        "changed": [{"name": row.name, "what": row.what} for row in change.changed],
        "added": [row.name for row in change.added],
        "removed": [row.name for row in change.removed],
        "before": dataclasses.asdict(change.before),
        "after": dataclasses.asdict(change.after),
    }


def _file_to_write(toml: Path | None, diff: Path | None, overwrite: bool) -> Path | None:
    """Return the file that `--toml` names; None without the option, and for standard output."""
    if toml == STDOUT:
        if diff is not None:
            raise PolicyError("--toml - and --diff would both print. Give --toml a file, or leave one out.")
        return None
    if toml is not None and toml.exists() and not overwrite:
        raise PolicyError(f"{toml}: exists. Pass --overwrite to replace it, or choose another file.")
    return toml


def _second_plan(path: Path, model: nn.Module | None, example: Tensor | None) -> Plan:
    """Return the plan that `--diff` names: of a policy file for the same model, or of a run or artifact."""
    if path.is_dir():
        return stored_plan(path, kind_of(str(path)))
    if model is None:
        raise PolicyError(f"--diff {path}: a run or artifact is compared with another one; give its directory.")
    return plan(model, policy=from_toml(path), example_inputs=example)


def stored_plan(path: Path, kind: str) -> Plan:
    """Return the plan of a run or artifact; where there is an artifact, with the signs that calibration chose."""
    artifact = path if kind == ARTIFACT else path / rundir.ARTIFACT
    return read_manifest(artifact).plan if (artifact / MANIFEST).is_file() else rundir.read_config(path).plan
