"""GPTQ: weights get the codes with which a layer's outputs stay what they were, not the nearest ones.

Rounding to the nearest level minimizes the error of the weight. What matters is the error of the layer's output, where
the errors of many weights add up or cancel, as their inputs are correlated. For a weight `W` and inputs `X`, columns
side by side, as the quantized layers before it and their quantizers give them,

    minimize  || Q X - W X ||^2   over weights Q on the grid

for which second moments of a few hundred images' inputs are enough: no labels, no gradients, no epochs.

Reference: "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (Frantar, Ashkboos,
Hoefler, Alistarh, ICLR 2023), https://arxiv.org/abs/2210.17323.

Stage after stage, so that inputs are what the layers before give with the levels that were chosen for them.

Which layers are chosen for, in the order in which a forward reaches them, and what their inputs are.

Layers of one block are one stage: their inputs are collected together, which costs one forward of each batch up to
there. It ends at the last layer that is asked for.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from daqconvert.batches import Enough, run_batch, run_batch_until
from daqconvert.functional.grid import quantize_weight
from daqconvert.layers.base import QuantizedLayer
from daqconvert.layers.site import Operation, Watcher, watching
from daqconvert.models import disabled, evaluating, quantized_layers
from daqconvert.posttraining.gptq_solver import columns, has_columns, output_error, second_moments, second_order_levels
from daqconvert.quantizers import WeightQuantizer
from daqconvert.report.fits import Fitted
from daqconvert.report.progress import progress

DAMPING = 0.01  # of GPTQ


@torch.no_grad()
def choose_codes(model: nn.Module, batches: list[Any], blocks: list[str], *, show: bool = True) -> list[Fitted]:
    """Set the weights of a quantized model, in place, to levels with which its layers' outputs stay what they were.

    Args:
        model: From `quantize`, calibrated.
        batches: Inputs as `calibrate` takes them; each block reads them once.
        blocks: Names of modules; layers of one are chosen for together, each other layer on its own.
        show: Whether to show progress.

    Returns:
        One entry per layer that a forward reaches and whose weight is quantized, in that order; `before` is the error
        of the nearest levels. Left alone are layers whose grid has no fixed step (normalized weights, LSQ), transposed
        and 3-D convolutions, and weights that are shared, computed, or depend on the data.

    Example:
        >>> qmodel, x = dq.quantize(nn.Sequential(nn.Linear(8, 4)), w_bits=4, a_bits=8), torch.randn(64, 8)
        >>> _ = dq.calibrate(qmodel, [x])
        >>> (found,) = choose_codes(qmodel, [x], [])
        >>> found.name, found.after <= found.before
        ('0', True)
    """
    with evaluating(model), torch.compiler.set_stance("force_eager"):
        seen = first_forward(model, batches[0])
        sites: dict[str, Any] = quantized_layers(model)
        todo = [name for name, found in seen.items() if not found.why_not]
        rows = {name: Fitted(name, left_alone=found.why_not) for name, found in seen.items()}
        with disabled(model), progress(len(todo), "GPTQ", enabled=show) as bar:
            for name in sites.keys() - todo:
                sites[name].enabled = True
            for _, group in groupby(todo, partial(_stage, blocks)):
                names = list(group)
                inputs = gather(model, batches, names, sum(seen[name].calls for name in names))
                for name in names:
                    rows[name] = _choose(sites[name], name, inputs[name])
                    sites[name].enabled = True
                    bar.advance(layer=name)
    return [row for name, row in rows.items() if sites[name].weight_quantizer is not None]


def _choose(site: QuantizedLayer, name: str, own: Tensor) -> Fitted:
    """Set one layer's weight; `own` are the second moments of its inputs."""
    quantizer = site.weight_quantizer
    assert isinstance(quantizer, WeightQuantizer)
    own = own.cpu() if own.device.type == "mps" else own  # it has no float64
    groups, inputs = own.shape[:2]
    weight = site.weight.detach().to(own.device, torch.float64).reshape(groups, -1, inputs)
    step = torch.as_tensor(quantizer.multiplier()).to(own.device, torch.float64)
    step = step.expand(len(site.weight)).reshape(groups, -1)
    nearest = partial(_nearest, quantizer=quantizer)
    plain = nearest(weight / step[:, :, None])
    operands = second_order_levels(weight, own, step, nearest, DAMPING)
    errors = [output_error(found * step[:, :, None], weight, own) for found in (plain, operands)]
    if errors[1] < errors[0]:
        site.weight.copy_((operands * step[:, :, None]).reshape(site.weight.shape))
    return Fitted(name, errors[0], min(errors))


def _nearest(steps: Tensor, quantizer: WeightQuantizer) -> Tensor:
    """Return the operand nearest to a weight that is given in steps."""
    top = steps.new_tensor(quantizer.top)
    return quantize_weight(steps, -top, top, quantizer.bits, quantizer.grid, quantizer.plain_rounding())


def _stage(blocks: list[str], name: str) -> str:
    return next((block for block in blocks if name == block or name.startswith(f"{block}.")), name)


MOST_INPUTS = 8192  # of one output: second moments are the square of it


@dataclass
class Seen:
    """What the first forward shows of a layer.

    Attributes:
        calls: Of one forward.
        why_not: Why nothing is chosen for it, or `""`.
    """

    calls: int = 0
    why_not: str = ""


class _First(Watcher):
    """Notes calls, in order, and what a layer cannot be chosen for."""

    def __init__(self, name: str, seen: dict[str, Seen]) -> None:
        self.name, self.seen = name, seen

    def before(self, site: Any, x: Tensor, weight: Tensor | None, operation: Operation) -> Tensor:
        """Note one call."""
        found = self.seen.setdefault(self.name, Seen())
        found.calls += 1
        found.why_not = found.why_not or _why_not(site, weight, operation)
        return x


def first_forward(model: nn.Module, batch: Any) -> dict[str, Seen]:
    """Return the layers that a forward reaches, in order, and which of them can be chosen for.

    Args:
        model: From `quantize`.
        batch: As `calibrate` takes it.
    """
    seen: dict[str, Seen] = {}
    sites = quantized_layers(model)
    with ExitStack() as stack:
        for name, site in sites.items():
            stack.enter_context(watching(site, _First(name, seen)))
        run_batch(model, batch)
    tensors = [id(site._parameters.get("weight")) for site in sites.values()]
    for name in seen:
        if tensors.count(id(sites[name]._parameters.get("weight"))) > 1:
            seen[name].why_not = seen[name].why_not or "shares its weight with another layer"
    return seen


def _why_not(site: Any, weight: Tensor | None, operation: Operation) -> str:
    quantizer = site.weight_quantizer
    if not isinstance(site, QuantizedLayer) or not isinstance(quantizer, WeightQuantizer):
        return "its weight depends on the data"
    if site.settings.rounding == "lsq" or site.unitless or quantizer.normalize:
        return "the grid of its weight has no fixed step"
    if weight is None or id(weight) != id(site._parameters.get("weight")):
        return "its weight is computed from other parameters"
    if not has_columns(operation):
        return "it is neither linear nor a convolution of one or two dimensions, padded by numbers"
    if weight[0].numel() > MOST_INPUTS:
        return f"an output has more than {MOST_INPUTS} inputs"
    return ""


class _Inputs(Watcher):
    """Adds up second moments of layers' inputs, until a forward has shown all of them."""

    def __init__(self) -> None:
        self.found: dict[nn.Module, Tensor] = {}
        self.left = 0

    def before(self, site: Any, x: Tensor, weight: Tensor | None, operation: Operation) -> Tensor:
        """Add those of one call; end the forward where it was the last."""
        assert weight is not None
        quantizer = site.input_quantizer
        grid = x if quantizer is None else quantizer(x) * quantizer.scale()
        own = second_moments(columns(operation, grid, tuple(weight.shape)))
        self.found[site] = self.found[site] + own if site in self.found else own
        self.left -= 1
        if not self.left:
            raise Enough
        return x


def gather(model: nn.Module, batches: Iterable[Any], names: list[str], calls: int) -> dict[str, Tensor]:
    """Return the second moments of some layers' inputs as their quantizers give them, `X X^T`, shape `(G, K, K)`.

    Args:
        model: From `quantize`, in evaluation mode; these layers are switched off, the ones before them are not.
        batches: As `calibrate` takes them.
        names: Of the layers.
        calls: How often they are called in one forward, together.
    """
    inputs, sites = _Inputs(), quantized_layers(model)
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(watching(sites[name], inputs))
        for batch in batches:
            inputs.left = calls
            run_batch_until(model, batch)
    return {name: inputs.found[sites[name]] for name in names}
