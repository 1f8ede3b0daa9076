"""Which parts a recipe needs, and what each of them gets from the run: in the one order in which they act.

First what changes the model or holds it still (widths, bounds, batch norms, oscillating weights), then what watches
and stops, and last what writes down. Contexts of `evaluating` open in the same order, so that batch norms are
estimated for the averaged weights; a resumed run has its widths before the average is loaded.
"""

from __future__ import annotations

from daqconvert.training.parts.batch_norm import FreshStatistics, FrozenBatchNorm, Reestimation
from daqconvert.training.parts.board import Board
from daqconvert.training.parts.ema import Average
from daqconvert.training.parts.guards import Guards, Stopping
from daqconvert.training.parts.oscillation import Oscillation
from daqconvert.training.parts.report_page import ReportPage
from daqconvert.training.parts.scheduled import FrozenBounds, ProgressiveBits, Sharpening
from daqconvert.training.parts.snapshots import Snapshots, StepLog
from daqconvert.training.run import Part, Run


def parts_for(run: Run) -> list[Part]:
    """Return the parts of a run whose optimizers are made, new ones."""
    recipe, oscillation = run.recipe, _oscillation(run)
    parts = _acting(run, oscillation)
    if recipe.patience:
        parts.append(Stopping(run, recipe.patience))
    guards = Guards(run.model, recipe, run.directory, tell=run.processes.is_main)
    steps, snapshots = StepLog(run), Snapshots(run.model, run.folder)
    board = Board(run.model, run.folder, steps, oscillation)
    return [*parts, guards, steps, snapshots, board, ReportPage(run, guards, steps, snapshots, oscillation)]


def _acting(run: Run, oscillation: Oscillation | None) -> list[Part]:
    """Return what changes the model or holds it still."""
    recipe, model, epochs, processes, total = run.recipe, run.model, run.train_epochs, run.processes, run.total_steps
    parts: list[Part] = []
    if recipe.final_w_sigma or recipe.final_a_sigma:  # sees the bits of the plan, before progressive changes them
        final = recipe.final_w_sigma, recipe.final_a_sigma
        parts.append(Sharpening(model, total, final=final, most_bits=recipe.final_sigma_bits))
    if recipe.progressive:
        parts.append(ProgressiveBits(run, recipe.progressive))
    if recipe.freeze_bounds_at < 1.0:
        parts.append(FrozenBounds(run.optimizers, total, recipe.freeze_bounds_at))
    if recipe.batch_norm_freeze_at < 1.0:
        parts.append(FrozenBatchNorm(model, total, recipe.batch_norm_freeze_at))
    if recipe.reestimate and recipe.batch_norm == "freeze":
        reconstructed = any(not row.left_alone for row in run.fitted.get("reconstruct", ()))
        parts.append(FreshStatistics(model, epochs, processes, recipe.reestimate, wanted=not reconstructed))
    if recipe.ema:
        parts.append(Average(model, recipe.ema, warmup=recipe.ema_warmup))
    if oscillation is not None:  # within the average, whose frozen weights it puts at their level
        parts.append(oscillation)
    if recipe.reestimate and recipe.batch_norm == "train":
        parts.append(Reestimation(model, epochs, processes, recipe.reestimate))
    return parts


def _oscillation(run: Run) -> Oscillation | None:
    if run.recipe.oscillation == "off":
        return None
    freeze = run.recipe.oscillation == "freeze"
    return Oscillation(run.model, freeze=freeze, threshold=run.recipe.oscillation_threshold)
