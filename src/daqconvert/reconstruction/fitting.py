"""One block is fitted: steps of Adam on its own output, each parameter at its own scale."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from daqconvert.quantizers import WeightQuantizer
from daqconvert.reconstruction.calls import Call, call_block, rows_of
from daqconvert.sizes import bounds_and_scales, parameter_sizes, quantized_weights, step_in_sizes

RATE = 0.02  # of a parameter's size, for each step
VALUES = 1 << 19  # of a block's output in one step: many images where they are small, few where they are large


@dataclass(frozen=True)
class Examples:
    """What a block is called with and what it is to return, batch by batch.

    Attributes:
        calls: Arguments.
        targets: Of each call.
        whole: Whether batches cannot be taken apart.
    """

    calls: list[Call]
    targets: list[Tensor]
    whole: bool

    def draw(self, generator: torch.Generator) -> tuple[Call, Tensor]:
        """Return one batch, or as many of its rows as give `VALUES` values, two at least."""
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
    """Train a block, in place, to return the targets; where the error does not fall it stays as it was.

    The steps are Adam's, whose size does not depend on the loss, in units of each parameter's own size (`sizes`).

    Args:
        block: In evaluation mode.
        examples: Its calls.
        trained: Its parameters that are trained.
        steps: Of training; their rate falls from `RATE` to 0 as a cosine.
        generator: Draws examples.
        advance: Called at every step.

    Returns:
        The error over all examples before and after.
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
    settle(block, trained)
    after = examples.error(block)
    if after < before:
        return before, after
    with torch.no_grad():  # NaN comes here too
        for parameter, value in zip(trained, kept, strict=True):
            parameter.copy_(value)
    return before, before


@torch.no_grad()
def settle(block: nn.Module, trained: list[nn.Parameter]) -> None:
    """Put trained weights on the levels that they have, which changes nothing that the block returns.

    Training leaves many of them right between two levels, from one to the other and back at every step: without this
    the least step of what trains them next would draw their levels anew.

    Args:
        block: In evaluation mode.
        trained: Its trained parameters.

    Reference: "Overcoming Oscillations in Quantization-Aware Training" (Nagel et al., ICML 2022), section 3.
    """
    chosen = {id(parameter) for parameter in trained}
    for weight, quantizer in quantized_weights(block):
        if id(weight) in chosen:
            weight.copy_(_on_levels(weight, quantizer))


def _on_levels(weight: Tensor, quantizer: WeightQuantizer) -> Tensor:
    """The weight as it is used, in its own units; one that is normalized as it is, for its levels move with it."""
    if quantizer.normalize:
        return weight
    layout, step = quantizer.layout, torch.as_tensor(quantizer.multiplier())
    step = step.reshape(layout.bound_view) if quantizer.per_channel else step
    return (quantizer(weight).reshape(layout.view) * step).reshape(weight.shape)


def trainable(block: nn.Module, shared: set[int]) -> list[nn.Parameter]:
    """Return quantized weights, bounds and scales, biases and norms.

    Other tensors - float weights, tables, what a parametrization computes from - stay as they are.

    Args:
        block: Part of a quantized model.
        shared: Parameters that stay, by `id`.
    """
    known = set(dict(quantized_weights(block))) | bounds_and_scales(block)
    return [p for p in block.parameters() if p.requires_grad and id(p) not in shared and (p in known or p.dim() < 2)]
