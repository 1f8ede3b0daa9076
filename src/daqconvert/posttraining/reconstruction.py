"""Block reconstruction: each block learns to return what it returns in the float model, one block after another.

    minimize  || B_q(x_q) - B(x) ||^2 / || B(x) ||^2   over the parameters of one block

where `x` is what the float network gives the block `B`, and `x_q` what the quantized blocks before it give. A whole
network that learns from the logits of a few hundred images soon overfits. The outputs of a block are thousands of
numbers for every image, and because the blocks before it are finished, its inputs do not change while it learns.

`reconstruct` goes through the blocks in the order in which a forward reaches them; `fit` trains one, by steps of Adam
in units of each parameter's own size (`sizes.py`).

Reference: "BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction" (Li et al., ICLR 2021),
https://arxiv.org/abs/2102.05426, section 3.2 and algorithm 1, with the squared error instead of the Fisher-weighted
one, and with weights that follow the gradient of their rounding instead of a learned choice of up or down.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from daqconvert.models import evaluating
from daqconvert.posttraining.blocks import (
    BlockFlow,
    Call,
    Stage,
    call_block,
    copied,
    rows_of,
    stages,
    treats_rows_alone,
)
from daqconvert.posttraining.norms import reestimate
from daqconvert.posttraining.sizes import (
    bounds_and_scales,
    parameter_sizes,
    quantized_weights,
    step_in_sizes,
)
from daqconvert.quantizers import WeightQuantizer
from daqconvert.report.fits import Fitted
from daqconvert.report.progress import progress

RATE = 0.02  # learning rate, in units of each parameter's size
VALUES = 1 << 19  # of a block's output in one step: many images if its output is small, few if it is large


def reconstruct(
    model: nn.Module, teacher: nn.Module, batches: list[Any], blocks: list[str], steps: int, *,
    seed: int = 0, show: bool = True,
) -> list[Fitted]:  # fmt: skip
    """Train blocks of a quantized model, in place, to return what those of a float model return.

    First the running statistics of a block's batch norms are estimated again. The inputs and outputs of one block at a
    time are held in memory, for all batches. Blocks that a forward calls more than once, or that do not return one
    tensor, stay as they are.

    Args:
        model: A calibrated model from `quantize`.
        teacher: The float model in evaluation mode, on the same device, with blocks of the same names;
            `daqconvert.models.float_copy` makes one.
        batches: Inputs as `calibrate` takes them.
        blocks: Names of modules, none inside another, as `block_names` gives them.
        steps: Number of training steps for each block.
        seed: Seed of the order of images.
        show: Whether to show progress.

    Returns:
        One entry for each block that a forward reaches, in that order; both errors are measured with the new
        statistics of its batch norms. `left_alone` says why a block stays as it is.

    Example:
        >>> from daqconvert.models import float_copy
        >>> blocks = [nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)) for _ in range(2)]
        >>> qmodel, x = dq.quantize(nn.Sequential(*blocks), w_bits=2, a_bits=4), torch.randn(64, 4)
        >>> _ = dq.calibrate(qmodel, [x])
        >>> rows = reconstruct(qmodel, float_copy(qmodel), [x], ["0", "1"], 20)
        >>> [(row.name, row.after < row.before) for row in rows]
        [('0', True), ('1', True)]
    """
    generator = torch.Generator().manual_seed(seed)
    rows: list[Fitted] = []
    with evaluating(model), torch.compiler.set_stance("force_eager"):
        found = stages(model, batches[0], blocks)
        ours, theirs, targets = BlockFlow(model, batches), BlockFlow(teacher, batches), None
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
                reestimate(ours.block, map(copied, ours.calls))
                filled = [i for i, target in enumerate(targets) if target.numel()]  # a box head may get no boxes
                if not filled:
                    rows.append(Fitted(stage.names[0], left_alone="it gets no inputs"))
                    bar.advance(steps)
                    continue
                whole = not treats_rows_alone(theirs.block, theirs.calls[filled[0]], targets[filled[0]])
                examples = Examples([ours.calls[i] for i in filled], [targets[i] for i in filled], whole)
                trained = trainable(ours.block, _used_elsewhere(model, ours.block))
                advance = partial(bar.advance, block=f"{number}/{len(found)}")
                errors = fit(ours.block, examples, trained, steps, generator, advance)
                rows.append(Fitted(stage.names[0], *errors))
    return rows


def _why_not(stage: Stage) -> str:
    """Return why a stage cannot be trained, `""` if it can."""
    if stage.calls > 1:
        return f"a forward calls it {stage.calls} times"
    return "" if stage.tensor else "it does not return one tensor of floating point"


def _used_elsewhere(model: nn.Module, block: nn.Module) -> set[int]:
    """Return the `id` of each parameter of a block that modules outside it have too."""
    inside = set(block.modules())
    others = {id(p) for m in model.modules() if m not in inside for p in m.parameters(recurse=False)}
    return {id(p) for p in block.parameters()} & others


def trainable(block: nn.Module, shared: set[int]) -> list[nn.Parameter]:
    """Return the parameters of a block that are trained: quantized weights, bounds and scales, biases and norms.

    Other tensors stay as they are: float weights, tables, what a parametrization computes from, and the parameters
    whose `id` is in `shared`.
    """
    known = set(dict(quantized_weights(block))) | bounds_and_scales(block)
    return [p for p in block.parameters() if p.requires_grad and id(p) not in shared and (p in known or p.dim() < 2)]


@dataclass(frozen=True)
class Examples:
    """What a block is called with and what it is to return, batch by batch.

    Attributes:
        calls: Arguments of each batch.
        targets: Output that the block is to return for each batch.
        whole: Whether a batch cannot be taken apart, because the block does not treat its rows alone.
    """

    calls: list[Call]
    targets: list[Tensor]
    whole: bool

    def draw(self, generator: torch.Generator) -> tuple[Call, Tensor]:
        """Return one batch, or as many of its rows, but at least two, as give `VALUES` values."""
        index = int(torch.randint(len(self.calls), (), generator=generator))
        call, target = self.calls[index], self.targets[index]
        count = len(target) if self.whole else max(2, VALUES // max(1, target[0].numel()))
        if count >= len(target):
            return call, target
        rows = torch.randperm(len(target), generator=generator)[:count].to(target.device)
        return rows_of(call, rows), target[rows]

    @torch.no_grad()
    def error(self, block: nn.Module) -> float:
        """Return `sum (B(x) - t)^2 / sum t^2`; 0 where all targets are 0."""
        difference = power = 0.0
        for call, target in zip(self.calls, self.targets, strict=True):
            difference += float((call_block(block, call) - target).double().square().sum())
            power += float(target.double().square().sum())
        return difference / power if power else 0.0


def fit(
    block: nn.Module, examples: Examples, trained: list[nn.Parameter], steps: int, generator: torch.Generator,
    advance: Callable[[], None],
) -> tuple[float, float]:  # fmt: skip
    """Train parameters of a block, in place, to return the targets; return the error on all examples before and after.

    If the error does not fall, the parameters stay as they were. The block is in evaluation mode; the rate falls
    from `RATE` to 0 as a cosine; `generator` draws the examples; `advance` is called at every step.
    """
    before = examples.error(block)
    power = sum(float(target.double().square().mean()) for target in examples.targets) / len(examples.targets)
    if not trained or not power:
        return before, before
    kept = [parameter.detach().clone() for parameter in trained]
    sizes = parameter_sizes(block)
    optimizer = torch.optim.Adam(trained, lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        call, target = examples.draw(generator)
        optimizer.zero_grad(set_to_none=True)
        loss = (call_block(block, call) - target).square().mean() / power
        loss.backward(inputs=trained)
        step_in_sizes(optimizer, sizes)
        schedule.step()
        advance()
    optimizer.zero_grad(set_to_none=True)
    _settle(block, trained)
    after = examples.error(block)
    if after < before:
        return before, after
    with torch.no_grad():  # also if `after` is NaN
        for parameter, value in zip(trained, kept, strict=True):
            parameter.copy_(value)
    return before, before


@torch.no_grad()
def _settle(block: nn.Module, trained: list[nn.Parameter]) -> None:
    """Move trained weights to the levels that they are rounded to, which does not change what the block returns.

    Training leaves many weights halfway between two levels, where every step pushes them to the other level. If they
    stayed there, even the smallest step of the training that follows would change their levels.

    Reference: "Overcoming Oscillations in Quantization-Aware Training" (Nagel et al., ICML 2022), section 3.
    """
    chosen = {id(parameter) for parameter in trained}
    for weight, quantizer in quantized_weights(block):
        if id(weight) in chosen:
            weight.copy_(_on_levels(weight, quantizer))
            quantizer.note_fit(weight)


def _on_levels(weight: Tensor, quantizer: WeightQuantizer) -> Tensor:
    """Return a weight moved to its levels; a normalized weight as it is, because its levels would move with it."""
    if quantizer.normalize:
        return weight
    layout, scale = quantizer.layout, torch.as_tensor(quantizer.scale())
    scale = scale.reshape(layout.bound_view) if quantizer.per_channel else scale
    return (quantizer(weight).reshape(layout.view) * scale).reshape(weight.shape)
