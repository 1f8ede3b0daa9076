"""Prepares random networks for measurements: no constant parameters, and true batch-norm statistics, all from a seed.

timm initializes some parameters to exact zeros (last gamma of a residual branch, heads, gains): then the output would
not depend on what comes before them. And running statistics of a new network are not those of its activations.
"""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.zoo.zoo_models import Network, call, inputs

SPREAD = 0.25  # constant parameters are drawn within +-25 % of their value
SMALL = 0.02  # standard deviation where that value is zero


@torch.no_grad()
def redraw(model: nn.Module, seed: int = 0) -> int:
    """Draw every constant floating parameter again, in place; return how many there were."""
    generator = torch.Generator().manual_seed(seed)
    count = 0
    for parameter in model.parameters():
        if not parameter.is_floating_point() or not parameter.numel():
            continue
        value = float(parameter.flatten()[0])
        if bool((parameter != value).any()):
            continue
        drawn = torch.rand(parameter.shape, generator=generator) * 2 - 1
        normal = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(value * (1 + SPREAD * drawn) if value else SMALL * normal)
        count += 1
    return count


@torch.no_grad()
def take_statistics(model: nn.Module, network: Network) -> int:
    """Give every batch norm the mean statistics of two passes; return how many there are.

    Only the batch norms are in training mode meanwhile, because dropout would change what they see in evaluation.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    norms = [norm for norm in norms if norm.running_mean is not None]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over passes
        norm.training = True
    if norms:
        for seed in (101, 102):
            call(model, inputs(network, seed))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.training = False
    return len(norms)


def prepared(network: Network, seed: int = 0) -> nn.Module:
    """Return a network in evaluation mode: weights from a seed, none constant, and its own batch-norm statistics."""
    model = network.build(seed)
    redraw(model, seed)
    take_statistics(model, network)
    return model
