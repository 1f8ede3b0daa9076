"""The names by which deployment knows what a model multiplies with."""

from __future__ import annotations

from torch import nn

from daqconvert.graph.rewrite import CODES, Rewritten
from daqconvert.layers import FrozenSite, QuantizedSite, is_site_type


def named_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return everything that can be watched by dotted name: sites, quantized or frozen, and float layers.

    A frozen layer with a forward of its own keeps its codes in a child; that child goes by the layer's name, as the
    quantized layer does.

    Args:
        model: Float, quantized or frozen.
    """
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if not (isinstance(module, (QuantizedSite, FrozenSite)) or is_site_type(module)):
            continue
        parent, _, last = name.rpartition(".")
        inside = (
            last == CODES and isinstance(module, FrozenSite) and isinstance(model.get_submodule(parent), Rewritten)
        )
        found[parent if inside else name] = module
    return found
