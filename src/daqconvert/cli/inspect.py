"""`daqconvert inspect`: what a run directory, an artifact or a model holds; nothing is computed or changed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from daqconvert.artifact import read_manifest
from daqconvert.cli import options as o
from daqconvert.cli.deployment import size_of
from daqconvert.cli.inspect_run import run_text
from daqconvert.cli.output import Output
from daqconvert.cli.plan import example_image
from daqconvert.cli.summary import bits_text
from daqconvert.cli.targets import ARTIFACT, MODEL, kind_of, refuse
from daqconvert.data import input_config
from daqconvert.graph import find_sites
from daqconvert.report.tables import plan_table, render, short_number, simple_table
from daqconvert.sources import build_model, parse_source

Target = Annotated[str, typer.Argument(help=f"A run directory, an artifact, or a model ({o.FORMS}).")]


def inspect_command(
    target: Target, model_arg: o.ModelArgs = None, input_size: o.InputSize = None, as_json: o.Json = False
) -> None:
    """Show a run's files and results, an artifact's layers and bits, or a model's convolutions and linear layers."""
    with Output(as_json).capturing() as output:
        kind = kind_of(target)
        if kind == MODEL:
            text, document = _model(target, o.pairs(model_arg, "--model-arg"), input_size)
        else:
            refuse(kind, model_arg=model_arg, input_size=input_size)
            text, document = (_artifact if kind == ARTIFACT else run_text)(Path(target))
        output.show(text, {"target": target, "kind": kind, **document})


def _artifact(path: Path) -> tuple[str, dict[str, Any]]:
    manifest = read_manifest(path)
    document: dict[str, Any] = {
        "model": manifest.model, "source": manifest.source, "source_kwargs": manifest.source_kwargs,
        "version": manifest.version, "daqconvert": manifest.daqconvert, "dtype": manifest.dtype,
        "bytes": size_of(path), "float_bytes": manifest.plan.float_bytes, "bits": bits_text(manifest.plan),
        "layers": {row.name: [row.weight_text, row.input_text] for row in manifest.plan.converted},
    }  # fmt: skip
    source = f"built from {manifest.source}" if manifest.source else "needs a skeleton"
    text = f"{path}: {manifest.model}, {source}, {document['bits']}, {document['bytes'] / 1000:.1f} kB"
    return f"{text}\n{render(plan_table(manifest.plan))}", document


def _model(name: str, arguments: dict[str, Any], side: int | None) -> tuple[str, dict[str, Any]]:
    model = build_model(name, **arguments)
    example = example_image(model, name, side)
    found = find_sites(model, example)
    config = input_config(model, name)
    rows = [
        (site.name, site.kind, "x".join(map(str, site.weight_shape)), short_number(site.params),
         short_number(site.macs), _remarks(site))
        for site in found.sites
    ]  # fmt: skip
    params = sum(value.numel() for value in model.parameters())
    size = None if example is None else tuple(example.shape[1:])
    text = (
        f"{parse_source(name)}: {type(model).__name__}, {short_number(params)} parameters, input {size or 'unknown'}"
    )
    table = render(simple_table("", ("layer", "type", "weight", "params", "MACs", "remarks"), rows))
    document = {
        "model": type(model).__name__, "params": params, "input_size": size,
        "normalization": None if config is None else {"mean": config.mean, "std": config.std},
        "sites": [dataclasses.asdict(site) for site in found.sites],
    }  # fmt: skip
    return f"{text}\n{table}", document


def _remarks(site: Any) -> str:
    words = ["first" * site.first, "last" * site.last, "input not negative" * site.nonnegative, site.reason]
    if site.call is not None:
        words.append(f"{site.call.function} in {', '.join(name or '(root)' for name in site.call.modules)}")
    if site.reads not in ("", site.name):
        words.append(f"reads what {site.reads} reads")
    words.append(site.one_scale)
    return "; ".join(filter(None, (*words, *site.notes)))
