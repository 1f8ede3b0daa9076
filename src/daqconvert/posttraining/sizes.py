"""How large a parameter is, so that a step can be a share of it.

Channels of one layer may differ a thousandfold in size if a batch norm follows. A learning rate that is one number for
all of them destroys the small channels or leaves the large ones almost unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from daqconvert.models import quantized_sites
from daqconvert.quantizers import WeightQuantizer
from daqconvert.quantizers.base import Quantizer
from daqconvert.quantizers.starting import normal_clip

SHARE = 0.1  # size of a parameter that is no quantized weight, as a share of its value


def quantized_weights(model: nn.Module) -> Iterator[tuple[nn.Parameter, WeightQuantizer]]:
    """Yield the weights of a quantized model that are parameters of their layers, each with its quantizer."""
    for site in quantized_sites(model).values():
        weight = site._parameters.get("weight")
        if weight is not None and isinstance(site.weight_quantizer, WeightQuantizer):
            yield weight, site.weight_quantizer


def bounds_and_scales(model: nn.Module) -> set[nn.Parameter]:
    """Return what quantizers and sites learn: bounds, LSQ's steps and output scales.

    Args:
        model: A quantized model, or a part of one.
    """
    quantizers = (module for module in model.modules() if isinstance(module, Quantizer))
    scales = (site.output_scale for site in quantized_sites(model).values())
    return {scale for scale in scales if isinstance(scale, nn.Parameter)}.union(
        *(quantizer.parameters() for quantizer in quantizers)
    )


@torch.no_grad()
def parameter_sizes(model: nn.Module) -> dict[nn.Parameter, Tensor]:
    """Return how large each parameter is, as a tensor that broadcasts against the parameter.

    The size of a quantized weight is about the distance of two levels, for each channel if its bounds are per channel.
    The size of bounds, LSQ's steps and output scales is a tenth of each value. The size of anything else is a tenth of
    its root mean square, or 0.1 if it is all 0.

    Args:
        model: A quantized model, or a part of one.

    Example:
        >>> import daqconvert as dq
        >>> qmodel = dq.quantize(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), w_bits=8, a_bits=8)
        >>> round(parameter_sizes(qmodel)[qmodel[1].weight].item(), 6)
        0.1
    """
    weights, scales = dict(quantized_weights(model)), bounds_and_scales(model)
    sizes: dict[nn.Parameter, Tensor] = {}
    for parameter in model.parameters():
        if parameter in weights:
            sizes[parameter] = _level_distance(parameter.detach(), weights[parameter])
        elif parameter in scales:
            sizes[parameter] = SHARE * parameter.detach().abs()
        else:
            size = parameter.detach().square().mean().sqrt()
            sizes[parameter] = SHARE * torch.where(size > 0, size, torch.ones_like(size))
    return sizes


def _level_distance(weight: Tensor, quantizer: WeightQuantizer) -> Tensor:
    """Return the distance of two levels that is best for a normal distribution with the weight's root mean square."""
    layout = quantizer.layout
    rows = layout.rows(weight.float())
    size = rows.square().mean(dim=1).sqrt() if quantizer.per_channel else rows.square().mean().sqrt().expand(len(rows))
    distance = size * (normal_clip(quantizer.top, quantizer.grid == "midrise") / quantizer.top)
    return distance.reshape(layout.bound_view).expand(layout.view).reshape(weight.shape).to(weight.dtype)


@torch.no_grad()
def step_in_sizes(optimizer: torch.optim.Optimizer, sizes: dict[nn.Parameter, Tensor]) -> None:
    """Let an optimizer take a step, with the change of each parameter multiplied by the parameter's size.

    Args:
        optimizer: An optimizer whose steps do not depend on the size of the gradient, such as Adam; its
            parameters have gradients.
        sizes: Size of each of its parameters, from `parameter_sizes`.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    last = [parameter.detach().clone() for parameter in parameters]
    optimizer.step()
    for parameter, value in zip(parameters, last, strict=True):
        parameter.copy_(torch.lerp(value, parameter.detach(), sizes[parameter]))
