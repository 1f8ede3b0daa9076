"""Stage after stage, so that inputs are what the layers before give with the levels that were chosen for them."""

from __future__ import annotations

from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from daqconvert.functional.grid import quantize_weight
from daqconvert.gptq.solver import output_error, second_order_levels
from daqconvert.gptq.stages import first_forward, gather
from daqconvert.layers.base import QuantizedLayer
from daqconvert.models import disabled, evaluating, quantized_layers
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
