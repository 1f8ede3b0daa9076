"""Freezing without a second copy of the weights: what becomes codes is read where it lies, and never copied."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from daqconvert.graph.rewrite import Rewritten
from daqconvert.layers.attention import QuantMultiheadAttention
from daqconvert.layers.base import QuantizedLayer
from daqconvert.quantizers import WeightQuantizer


def coded_weights(model: nn.Module) -> list[Tensor]:
    """Return the parameters that freezing reads and then drops, and that nothing else in the model refers to.

    Those that a layer computes its weight from are not among them (pruning, weight norm, a parametrization): taking
    these apart writes into them.

    Args:
        model: Quantized.
    """
    found = {id(p): p for module in model.modules() for p in _dropped(module) if p is not None}
    for module in model.modules():
        attributes = [value for key, value in vars(module).items() if key != "_parameters"]
        for leaf in tree_leaves(attributes):
            found.pop(id(leaf), None)
    return list(found.values())


def _dropped(module: nn.Module) -> Iterator[Tensor | None]:
    if isinstance(module, QuantizedLayer) and isinstance(module.weight_quantizer, WeightQuantizer):
        yield module._parameters.get("weight")
    if isinstance(module, Rewritten):
        yield from (module._parameters.get(name) for name in module.rewriting.unused)
    if isinstance(module, QuantMultiheadAttention):
        yield module._parameters.get("in_proj_weight")


def own_parameters(model: nn.Module, shared: Iterable[Tensor]) -> None:
    """Give a model copies of the parameters that it still shares with another; ties between its modules stay.

    Args:
        model: Frozen; an embedding tied to a frozen layer still has its weight, for example.
        shared: From `coded_weights`.
    """
    others, copies = {id(p) for p in shared}, dict[int, Any]()
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in others:
                with torch.no_grad():
                    copies.setdefault(id(parameter), nn.Parameter(parameter.clone(), parameter.requires_grad))
                module._parameters[name] = copies[id(parameter)]
