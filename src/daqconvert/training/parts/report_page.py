"""`report.html` and `warnings.jsonl` in the run directory, written anew after every epoch.

Drawing the page takes up to a second, so it is left out after some of a run's short epochs: drawing may take at most a
twentieth of the time. When a run ends, whatever ends it, the page is always drawn.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import timm
import torch

from daqconvert.convert import current_plan
from daqconvert.errors import TrainingError
from daqconvert.files import write_text
from daqconvert.layers.site import QuantizedSite
from daqconvert.quantizers import WeightQuantizer
from daqconvert.report.layer_cards import LayerReport
from daqconvert.report.training_page import TrainingReport, training_page
from daqconvert.spec import Plan
from daqconvert.training.parts.guards import Guards
from daqconvert.training.parts.measures import sites_of
from daqconvert.training.parts.oscillation import Oscillation
from daqconvert.training.parts.snapshots import Snapshots, StepLog
from daqconvert.training.recipes import RECIPES, Recipe
from daqconvert.training.run import Part, Run
from daqconvert.training.rundir import PAGE, Appended, Row, resume_command, shell_job, telling
from daqconvert.version import __version__

SHARE = 0.05  # of the time that may go into drawing
FIRST_GUESS = 0.5  # seconds


class ReportPage(Part):
    """Writes the page of the run, and the warnings as a file.

    Args:
        run: The run.
        guards: The part that has the warnings and the number of weights on each level.
        steps: The part that has the loss by step.
        snapshots: The part that has the bounds by epoch.
        oscillation: The part that has the shares of oscillating and frozen weights; None where they are not followed.
    """

    name: ClassVar[str] = "report"

    def __init__(
        self, run: Run, guards: Guards, steps: StepLog, snapshots: Snapshots, oscillation: Oscillation | None
    ) -> None:
        self.run, self.guards, self.steps, self.snapshots, self.oscillation = (
            run,
            guards,
            steps,
            snapshots,
            oscillation,
        )
        self._written, self._took = time.perf_counter(), FIRST_GUESS
        self._told: set[Path] = set()
        self._finished = False

    def after_epoch(self, row: Row) -> None:
        """Write the page, unless that would take too much of the time."""
        folder = self.run.folder
        if folder is not None:
            self._write_warnings(folder / "warnings.jsonl")
            if time.perf_counter() - self._written > self._took / SHARE:
                self._write(folder, [*self.run.history, row], finished=False)

    def finish(self) -> None:
        """Write the page of the whole run."""
        if self.run.folder is not None:
            self._write(self.run.folder, self.run.history, finished=True)
            self._finished = True

    def close(self) -> None:
        """Write the page of a run that ends before its last epoch, for whatever reason."""
        if self.run.folder is not None and not self.run.finished and not self._finished:
            self._write(self.run.folder, self.run.history, finished=False)

    def _write(self, folder: Path, rows: list[Row], *, finished: bool) -> None:
        started, path = time.perf_counter(), folder / PAGE
        with telling(path, self._told):
            write_text(path, training_page(self._report(folder, rows, finished=finished)), TrainingError)
        self._written = time.perf_counter()
        self._took = self._written - started

    def _write_warnings(self, path: Path) -> None:
        if not self.guards.warnings:
            Appended(path).clear()
            return
        with telling(path, self._told):
            write_text(path, "".join(json.dumps(warning) + "\n" for warning in self.guards.warnings), TrainingError)

    def _report(self, folder: Path, rows: list[Row], *, finished: bool) -> TrainingReport:
        """Return what the page shows; `rows` is the history with the epoch that has just ended."""
        run, plan = self.run, current_plan(self.run.model)
        job = shell_job(folder)
        facts = [
            plan.model,
            *([job.get("data") or "scikit-learn's digits"] if job else []),
            f"run {folder.resolve().name}",
        ]
        facts += [f"recipe {run.recipe.name}", f"policy {plan.policy}"]
        return TrainingReport(
            title=f"{job.get('model') or plan.model}, {plan.label}",
            subtitle=" · ".join(facts),
            finished=finished,
            epochs=run.recipe.epochs,
            rows=rows,
            best_epoch=None if run.best is None else run.best["epoch"],
            layers=self._layers(plan),
            fitted=run.fitted,
            steps=[(step / run.steps, loss) for step, loss in self.steps.rows] if run.steps else [],
            warnings=self.guards.warnings,
            tables={
                "Result": _result(run, rows),
                f"Recipe {run.recipe.name}": _kept(run.recipe),
                **_changed(run.recipe),
                "Sizes": _sizes(plan),
                "Environment": _environment(run),
            },
            commands=_commands(folder.resolve(), job, finished=finished),
        )

    def _layers(self, plan: Plan) -> list[LayerReport]:
        shares = self.oscillation.shares if self.oscillation is not None else {}
        rows = {row.name or "(root)": row for row in plan}
        found = []
        for name, site in sites_of(self.run.model).items():
            row, share = rows.get(name), shares.get(name)
            found.append(
                LayerReport(
                    name=name,
                    kind=row.site.kind if row is not None else type(site).__name__,
                    params=row.site.params if row is not None else None,
                    bits=_bits(site),
                    moments=[(epoch, sites[name]) for epoch, sites in self.snapshots.moments if name in sites],
                    levels=self.guards.levels.get(name),
                    start=self.snapshots.start_levels.get(name),
                    unit="std" if isinstance(site.weight_quantizer, WeightQuantizer) and site.unitless else "",
                    oscillating=share[0] if share else None,
                    frozen=share[1] if share else None,
                    rule=row.rule if row is not None else "",
                )
            )
        return found


def _bits(site: QuantizedSite) -> tuple[int | None, int | None]:
    return (
        None if site.weight_quantizer is None else site.weight_quantizer.bits,
        None if site.input_quantizer is None else site.input_quantizer.bits,
    )


def _result(run: Run, rows: list[Row]) -> dict[str, object]:
    best, last = run.best, rows[-1] if rows else {}
    found: dict[str, object] = {"epochs": f"{len(rows)} of {run.recipe.epochs}", "steps": last.get("step")}
    if run.stop is not None:
        found["stopped"] = run.stop
    if best is not None:
        found["best epoch"] = best["epoch"]
        if best["val_top1"] is not None:
            found["its top-1"] = f"{100 * best['val_top1']:.2f} %"
        found["its validation loss"] = best["val_loss"]
    found["training time, s"] = round(sum(row.get("seconds") or 0.0 for row in rows), 1)
    return found


def _kept(recipe: Recipe) -> dict[str, object]:
    """Return the fields that a reader wants to see of any recipe."""
    return {key: getattr(recipe, key) for key in ("epochs", "lr", "quantizer_lr", "schedule", "distill", "seed")}


def _changed(recipe: Recipe) -> dict[str, dict[str, object]]:
    """Return the table of the fields that are not those of the recipe of that name, `quick` if it is from a file."""
    base = RECIPES.get(recipe.name, RECIPES["quick"])
    before = base.to_dict()
    found: dict[str, object] = {
        key: f"{value} (was {before[key]})"
        for key, value in recipe.to_dict().items()
        if key != "name" and value != before[key]
    }
    return {f"Changed from recipe {base.name}": found} if found else {}


def _sizes(plan: Plan) -> dict[str, object]:
    totals = plan.totals
    found: dict[str, object] = {
        "quantized layers": f"{totals.converted} of {totals.sites}",
        "parameters": f"{totals.params:,}",
        "bytes": f"{totals.bytes:,} ({totals.float_bytes:,} in float32)",
    }
    if totals.macs is not None:
        found["multiply-accumulates"] = f"{totals.macs:,}"
    return found


def _environment(run: Run) -> dict[str, object]:
    device = str(run.processes.device)
    if device.startswith("cuda"):
        device = f"{device} ({torch.cuda.get_device_name(run.processes.device)})"
    return {
        "daqconvert": __version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "Python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": device,
        "threads": torch.get_num_threads(),
        "processes": run.processes.count,
        "precision": run.processes.precision,
    }


def _commands(path: Path, job: Mapping[str, Any], *, finished: bool) -> Mapping[str, str]:
    """Return what resumes and repeats the run: for the shell if it was started there, else in Python."""
    if job:
        return {} if finished else {"Go on": resume_command(path, job.get("model"))}
    recipe = str(path / "recipe.toml")
    call = f"daqconvert.finetune(qmodel, train_loader, val_loader, recipe={recipe!r}, out_dir="
    again = {"Repeat it": f"{call}{f'{path}-again'!r})"}
    return again if finished else {"Go on": f"{call}{str(path)!r}, resume=True)", **again}
