"""One block is fitted: steps of Adam on its own output, each parameter at its own scale."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from daqconvert.layers.site import QuantizedSite
from daqconvert.quantizers import WeightQuantizer
from daqconvert.quantizers.widths import normal_clip
from daqconvert.reconstruction.calls import Call, call_block, rows_of

STEP_RATE = 0.02  # of a weight's own quantization step, for each step of training
RATE = 1e-3
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
    block: nn.Module, examples: Examples, groups: list[dict[str, Any]], steps: int, generator: torch.Generator,
    advance: Callable[[], None],
) -> tuple[float, float]:  # fmt: skip
    """Train a block, in place, to return the targets; where the error does not fall it stays as it was.

    Args:
        block: In evaluation mode.
        examples: Its calls.
        groups: What is trained, as an optimizer takes it.
        steps: Of training; rates fall as a cosine.
        generator: Draws examples.
        advance: Called at every step.

    Returns:
        The error over all examples before and after.
    """
    before = examples.error(block)
    trained: list[Tensor] = [parameter for group in groups for parameter in group["params"]]
    kept = [parameter.detach().clone() for parameter in trained]
    power = sum(float(target.double().square().mean()) for target in examples.targets) / len(examples.targets)
    if not groups or not power:
        return before, before
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        call, target = examples.draw(generator)
        optimizer.zero_grad(set_to_none=True)
        loss = (call_block(block, call) - target).square().mean() / power
        loss.backward(inputs=trained)
        optimizer.step()
        schedule.step()
        advance()
    optimizer.zero_grad(set_to_none=True)
    after = examples.error(block)
    if after < before:
        return before, after
    with torch.no_grad():  # NaN comes here too
        for parameter, value in zip(trained, kept, strict=True):
            parameter.copy_(value)
    return before, before


def parameter_groups(block: nn.Module, shared: set[int]) -> list[dict[str, Any]]:
    """Return what is trained, and how fast: weights by their quantization step; biases, norms and bounds at `RATE`.

    Other tensors of two dimensions or more - float weights, tables, what a parametrization computes from - stay.

    Args:
        block: Part of a quantized model.
        shared: Parameters that stay, by `id`.
    """
    quantizers = {
        id(site._parameters.get("weight")): site.weight_quantizer
        for site in block.modules()
        if isinstance(site, QuantizedSite) and isinstance(site.weight_quantizer, WeightQuantizer)
    }
    groups: list[dict[str, Any]] = []
    for parameter in block.parameters():
        if not parameter.requires_grad or id(parameter) in shared:
            continue
        if id(parameter) in quantizers:
            groups.append({"params": [parameter], "lr": STEP_RATE * _step(parameter, quantizers[id(parameter)])})
        elif parameter.dim() < 2:
            groups.append({"params": [parameter], "lr": RATE})
    return groups


def _step(weight: Tensor, quantizer: WeightQuantizer) -> float:
    """About one quantization step: what is best for a normal distribution of the weight's size."""
    size = float(weight.detach().double().square().mean().sqrt())
    return size * normal_clip(quantizer.top, quantizer.grid == "midrise") / quantizer.top
