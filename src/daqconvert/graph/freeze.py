"""Freezing the sites of a model in place: codes instead of weights, whoever computes with them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from daqconvert.graph.apply import drop_projection_weights
from daqconvert.graph.rewrite import CODES, Rewritten, rewritten_class
from daqconvert.layers.attention import QuantMultiheadAttention
from daqconvert.layers.base import QuantizedLayer
from daqconvert.layers.call_holders import FrozenFunctionalSite, FunctionalSite, OwnSite
from daqconvert.layers.frozen_site import drop_quantizers, frozen_values
from daqconvert.layers.lookup import frozen_class
from daqconvert.layers.output_quantizers import OutputSite, freeze_output


def freeze_sites(model: nn.Module) -> None:
    """Turn every quantized site of a model into its frozen form, in place.

    Args:
        model: Quantized, every bound set.
    """
    modules = list(model.modules())
    # the weight of a call may be computed from what the layers below are about to lose
    values = {id(m): frozen_values(m) for m in modules if isinstance(m, (FunctionalSite, OwnSite))}
    for module in modules:
        if isinstance(module, QuantizedLayer):
            frozen_class(module.original).freeze(module)
        elif isinstance(module, OutputSite):
            freeze_output(module, frozen_values(module))
        elif id(module) in values:
            _freeze_call(module, values[id(module)])
    for module in modules:
        if isinstance(module, Rewritten):
            module.rewriting = module.rewriting.frozen()
            module.rewriting.drop_unused(module)
        elif isinstance(module, QuantMultiheadAttention):
            drop_projection_weights(module)


def _freeze_call(module: Any, values: dict[str, Tensor]) -> None:
    settings, name = module.settings, module.layer_name
    dtype = module.output_scale.dtype
    drop_quantizers(module)
    holder = module
    if isinstance(module, FunctionalSite):
        del holder.source
        holder.__class__ = FrozenFunctionalSite
    else:
        holder = FrozenFunctionalSite()
        holder.output_dims = module.output_dims
        for attribute in ("weight_of", "output_dims", "settings", "layer_name", "watchers"):
            delattr(module, attribute)
        module.__class__ = rewritten_class(module.original, (), "Frozen")
        module.add_module(CODES, holder)
    holder.training = False
    holder.hold(settings, name, dtype, values)
