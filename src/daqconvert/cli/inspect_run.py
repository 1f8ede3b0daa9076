"""What `daqconvert inspect` says of a run: where it stands, what it warned of, which files it has."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from daqconvert.cli import rundir
from daqconvert.cli.deployment import size_of
from daqconvert.cli.summary import bits_text, summary_text
from daqconvert.errors import TrainingError
from daqconvert.report.tables import render, simple_table
from daqconvert.training.checkpoint import read_checkpoint

SHOWN = 5  # warnings


def run_text(path: Path) -> tuple[str, dict[str, Any]]:
    """Return a run as text and as plain values.

    Args:
        path: The run directory.
    """
    config = rundir.read_config(path)
    files = {entry.name: size_of(entry) for entry in sorted(path.iterdir()) if not entry.name.startswith(".")}
    summary = rundir.read_json(path / rundir.SUMMARY) if rundir.SUMMARY in files else None
    job = {key: value for key, value in dataclasses.asdict(config.job).items() if value not in (None, {}, False)}
    progress, warnings = _progress(path), _warnings(path)
    facts = [f"{path}: {config.job.source}, {bits_text(config.plan)}, recipe {config.recipe.name}"]
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
    """Where the last checkpoint stands; None where there is none."""
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
