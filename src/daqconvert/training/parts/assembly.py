"""Makes the parts that a recipe needs, in the order in which they act, and gives each what it needs of the run.

First come the parts that change the model or hold something in it still (bits, bounds, batch norms, average,
oscillating weights), then those that watch and stop the run, last those that write files. `evaluating` and `load` are
called in the same order: batch norms are estimated for the averaged weights, and in a resumed run the model has its
bits before the average is loaded.
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
    """Return new parts for a run, whose optimizers have to be there."""
    recipe, oscillation = run.recipe, _oscillation(run)
    parts = _acting(run, oscillation)
    if recipe.patience:
        parts.append(Stopping(run, recipe.patience))
    guards = Guards(run.model, recipe, run.directory, tell=run.processes.is_main)
    steps, snapshots = StepLog(run), Snapshots(run.model, run.folder)
    board = Board(run.model, run.folder, steps, oscillation)
    return [*parts, guards, steps, snapshots, board, ReportPage(run, guards, steps, snapshots, oscillation)]


def _acting(run: Run, oscillation: Oscillation | None) -> list[Part]:
    """Return the parts that change the model or hold something in it still."""
    recipe, model, epochs, processes, total = run.recipe, run.model, run.train_epochs, run.processes, run.total_steps
    parts: list[Part] = []
    if recipe.final_w_sigma or recipe.final_a_sigma:  # needs the bits of the plan, before progressive changes them
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
    if oscillation is not None:  # after the average, in which it puts frozen weights at their level
        parts.append(oscillation)
    if recipe.reestimate and recipe.batch_norm == "train":
        parts.append(Reestimation(model, epochs, processes, recipe.reestimate))
    return parts


def _oscillation(run: Run) -> Oscillation | None:
    if run.recipe.oscillation == "off":
        return None
    freeze = run.recipe.oscillation == "freeze"
    return Oscillation(run.model, freeze=freeze, threshold=run.recipe.oscillation_threshold)
