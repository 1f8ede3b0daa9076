"""Weights that a layer computes from other parameters before its forward: parametrizations, weight norm, pruning.

A quantized layer keeps computing such a weight, so training goes on as before. A frozen layer needs only the result;
the parameters that the weight was computed from are removed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm, SpectralNormLoadStateDictPreHook, remove_spectral_norm
from torch.nn.utils.weight_norm import WeightNorm

from daqconvert.layers.mode import evaluating


def is_computed(module: nn.Module) -> bool:
    """Whether a layer's weight is not a parameter but computed from parameters."""
    with evaluating(module):
        return "weight" not in module._parameters and isinstance(getattr(module, "weight", None), Tensor)


def plain_class(cls: type[nn.Module]) -> type[nn.Module]:
    """Return the class without parametrization: the base of a class made by torch's `parametrize`, else `cls`."""
    injected = cls.__name__.startswith("Parametrized") and cls.__module__.startswith("torch.nn.utils.parametrize")
    return cls.__bases__[0] if injected else cls


@torch.no_grad()
def settle_weight(module: Any) -> None:
    """Make every computed tensor of a layer a parameter with its current value, and remove what computed it, in place.

    The layer's class changes only if it is parametrized.
    """
    if parametrize.is_parametrized(module):
        with evaluating(module):
            values = {name: getattr(module, name).detach() for name in module.parametrizations}
        module.__class__ = plain_class(getattr(module, "original", type(module)))
        del module.parametrizations
        for name, value in values.items():
            module.register_parameter(name, nn.Parameter(value, requires_grad=value.is_floating_point()))
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, SpectralNorm):
            remove_spectral_norm(module, hook.name)
            for number, loading in list(module._load_state_dict_pre_hooks.items()):
                # NOTE: torch stores this hook wrapped and so fails to remove it; left there, it would break loading
                if isinstance(getattr(loading, "hook", loading), SpectralNormLoadStateDictPreHook):
                    del module._load_state_dict_pre_hooks[number]
        elif isinstance(hook, (WeightNorm, BasePruningMethod)):
            hook.remove(module)
            del module._forward_pre_hooks[key]
