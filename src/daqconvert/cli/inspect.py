"""`daqconvert inspect`: what a model, an artifact or a run directory holds; nothing is trained, measured or changed.

For a run it shows how far training got, its warnings and its files.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from daqconvert.artifact import read_manifest
from daqconvert.cli import options as o
from daqconvert.cli import rundir
from daqconvert.cli.deployment import summary_text
from daqconvert.cli.output import Output
from daqconvert.cli.rundir import size_of
from daqconvert.cli.sources import ARTIFACT, MODEL, example_image, kind_of, refuse
from daqconvert.data import input_config
from daqconvert.errors import TrainingError
from daqconvert.graph import find_sites
from daqconvert.report.tables import plan_table, render, short_number, simple_table
from daqconvert.sources import build_model, parse_source
from daqconvert.training.checkpoint import read_checkpoint

Source = Annotated[str, typer.Argument(help=f"A run directory, an artifact, or a model ({o.FORMS}).")]


def inspect_command(
    source: Source, model_arg: o.ModelArg = None, input_size: o.InputSize = None, as_json: o.Json = False
) -> None:
    """Show a run's files and results, an artifact's layers and bits, or a model's convolutions and linear layers."""
    with Output(as_json).capturing() as output:
        kind = kind_of(source)
        if kind == MODEL:
            text, document = _model(source, o.pairs(model_arg, "--model-arg"), input_size)
        else:
            refuse(kind, model_arg=model_arg, input_size=input_size)
            text, document = (_artifact if kind == ARTIFACT else run_text)(Path(source))
        output.show(text, {"target": source, "kind": kind, **document})


def _artifact(path: Path) -> tuple[str, dict[str, Any]]:
    manifest = read_manifest(path)
    document: dict[str, Any] = {
        "model": manifest.model, "source": manifest.source, "source_kwargs": manifest.source_kwargs,
        "version": manifest.version, "daqconvert": manifest.daqconvert, "dtype": manifest.dtype,
        "bytes": size_of(path), "float_bytes": manifest.plan.float_bytes, "bits": manifest.plan.label,
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


SHOWN = 5  # warnings


def run_text(path: Path) -> tuple[str, dict[str, Any]]:
    """Return a run as text and as plain values."""
    config = rundir.read_config(path)
    files = {entry.name: size_of(entry) for entry in sorted(path.iterdir()) if not entry.name.startswith(".")}
    summary = rundir.read_json(path / rundir.SUMMARY) if rundir.SUMMARY in files else None
    job = {key: value for key, value in dataclasses.asdict(config.job).items() if value not in (None, {}, False)}
    progress, warnings = _progress(path), _warnings(path)
    facts = [f"{path}: {config.job.source}, {config.plan.label}, recipe {config.recipe.name}"]
    facts += ["  ".join(f"{key}={value}" for key, value in job.items())] if job else []
    facts += [_progress_text(progress, config.recipe.epochs), *_warning_lines(warnings)]
    table = render(simple_table("", ("file", "bytes"), list(files.items())))
    last = summary_text(summary, path) if summary else "not finished: it has no summary"
    document = {
        "job": job, "recipe": config.recipe.to_dict(), "progress": progress, "warnings": warnings, "files": files,
        "summary": summary,
    }  # fmt: skip
    return "\n".join([*facts, table, last]), document


def _progress(path: Path) -> dict[str, Any] | None:
    """Return how far the run got by its last checkpoint; None if there is no checkpoint."""
    kept = sorted((file.name for file in (path / "checkpoints").glob("step-*.safetensors")), reverse=True)
    last = path / "last.safetensors"
    if not last.is_file():
        return None
    try:
        about = read_checkpoint(last).meta
        position, best = about["position"], about["best"]
    except (TrainingError, KeyError) as error:
        return {"damaged": str(error), "checkpoints": kept}
    return {
        "step": position["number"], "epochs_done": about["epochs_done"], "step_of_epoch": position["steps"],
        "best_epoch": best and best["epoch"], "best_top1": best and best["val_top1"], "stop": about["stop"],
        "processes": about["processes"], "checkpoints": kept,
    }  # fmt: skip


def _progress_text(found: Mapping[str, Any] | None, epochs: int) -> str:
    if found is None:
        return "not trained yet: it has no checkpoint"
    kept = f"; earlier checkpoints: {', '.join(found['checkpoints'])}" if found["checkpoints"] else ""
    if "damaged" in found:
        return f"{found['damaged']}{kept}"
    words = [f"step {found['step']}, {found['epochs_done']} of {epochs} epochs"]
    if found["step_of_epoch"]:
        words.append(f"{found['step_of_epoch']} steps of the next")
    if found["best_epoch"] is not None:
        top1 = found["best_top1"]
        words.append(f"best epoch {found['best_epoch']}" + (f" ({100 * top1:.2f} %)" if top1 is not None else ""))
    if found["stop"]:
        words.append(f"stopped early: {found['stop']}")
    if found["processes"] > 1:
        words.append(f"on {found['processes']} processes")
    return ", ".join(words) + kept


def _warnings(path: Path) -> list[dict[str, Any]]:
    file = path / rundir.LOGS["warnings"]
    if not file.is_file():
        return []
    try:
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise TrainingError(f"{file} could not be read ({error}).") from error


def _warning_lines(warnings: list[dict[str, Any]]) -> list[str]:
    if not warnings:
        return []
    more = [f"  and {len(warnings) - SHOWN} more in {rundir.LOGS['warnings']}"] if len(warnings) > SHOWN else []
    shown = [f"  epoch {one.get('epoch')}: {one.get('text')}" for one in warnings[:SHOWN]]
    return [f"warnings: {len(warnings)}", *shown, *more]
