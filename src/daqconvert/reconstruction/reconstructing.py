"""Block after block, in the order in which a forward reaches them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from daqconvert.models import evaluating
from daqconvert.norms import estimate
from daqconvert.reconstruction.calls import Flow, Stage, copied, stages, treats_rows_alone
from daqconvert.reconstruction.fitting import Examples, fit, trainable
from daqconvert.report.fits import Fitted
from daqconvert.report.progress import progress


def reconstruct(
    model: nn.Module, teacher: nn.Module, batches: list[Any], blocks: list[str], steps: int, *,
    seed: int = 0, show: bool = True,
) -> list[Fitted]:  # fmt: skip
    """Train blocks of a quantized model, in place, to return what those of a float model return.

    Batch norms of a block take their statistics anew first. One block's inputs and outputs are held for all batches.

    Args:
        model: From `quantize`, calibrated.
        teacher: The float model, with blocks of the same names, on the same device; in evaluation mode.
        batches: Inputs as `calibrate` takes them.
        blocks: Names of modules, none inside of another.
        steps: Of training for each block.
        seed: Of the order of images.
        show: Whether to show progress.

    Returns:
        One entry per block that a forward reaches, in that order; its batch norms are estimated anew before either
        error. Left alone are blocks that it calls more than once and blocks that do not return one tensor.

    Example:
        >>> from daqconvert.training.objective import float_teacher
        >>> blocks = [nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)) for _ in range(2)]
        >>> qmodel, x = dq.quantize(nn.Sequential(*blocks), w_bits=2, a_bits=4), torch.randn(64, 4)
        >>> _ = dq.calibrate(qmodel, [x])
        >>> rows = reconstruct(qmodel, float_teacher(qmodel), [x], ["0", "1"], 20)
        >>> [(row.name, row.after < row.before) for row in rows]
        [('0', True), ('1', True)]
    """
    generator = torch.Generator().manual_seed(seed)
    rows: list[Fitted] = []
    with evaluating(model), torch.compiler.set_stance("force_eager"):
        found = stages(model, batches[0], blocks)
        ours, theirs, targets = Flow(model, batches), Flow(teacher, batches), None
        with progress(steps * len(found), "reconstruct", enabled=show) as bar:
            for number, stage in enumerate(found, 1):
                if why_not := _why_not(stage):
                    rows.append(Fitted(stage.names[0], left_alone=why_not))
                    targets = None
                    bar.advance(steps)
                    continue
                carried = stage.chained and targets is not None
                ours.reach(stage, ours.outputs() if carried else None)
                theirs.reach(stage, targets if carried else None)
                targets = theirs.outputs()
                estimate(ours.block, map(copied, ours.calls))
                whole = not treats_rows_alone(theirs.block, theirs.calls[0], targets[0])
                examples = Examples(ours.calls, targets, whole)
                trained = trainable(ours.block, _used_elsewhere(model, ours.block))
                advance = partial(bar.advance, block=f"{number}/{len(found)}")
                errors = fit(ours.block, examples, trained, steps, generator, advance)
                rows.append(Fitted(stage.names[0], *errors))
    return rows


def _why_not(stage: Stage) -> str:
    if stage.calls > 1:
        return f"a forward calls it {stage.calls} times"
    return "" if stage.tensor else "it does not return one tensor of floating point"


def _used_elsewhere(model: nn.Module, block: nn.Module) -> set[int]:
    """Parameters of a block, by `id`, that modules outside of it have too."""
    inside = set(block.modules())
    others = {id(p) for m in model.modules() if m not in inside for p in m.parameters(recurse=False)}
    return {id(p) for p in block.parameters()} & others
