"""What a frozen layer of integer deployment has taken over from the modules behind it, for who compares two models.

Its output is that of the batch norm and the activation behind it. Beside it, the same layer of a model that is not
frozen so - float, quantized - is seen after the same modules.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from daqconvert.convert import PLAN_ATTRIBUTE
from daqconvert.layers.frozen_site import FrozenSite
from daqconvert.layers.integer_layers import folded_numbers, folds, is_integer
from daqconvert.spec import Output


def epilogues(model: object) -> dict[str, Output]:
    """Return what stands behind each layer that integer deployment rounds, by the layer's name.

    Args:
        model: Frozen for integer deployment; anything else has none.
    """
    if not isinstance(model, nn.Module):
        return {}
    rows = getattr(model, PLAN_ATTRIBUTE, ())
    integer = {m.layer_name for m in model.modules() if isinstance(m, FrozenSite) and is_integer(m)}
    return {row.name: row.site.output for row in rows if row.name in integer and row.site.output is not None}


def behind(modules: dict[str, nn.Module], output: Output, y: Tensor) -> Tensor:
    """Return a layer's output after its batch norm and activation, as a model in evaluation mode computes them.

    Args:
        modules: Of that model, by dotted name.
        output: What stands behind the layer.
        y: Its own output, channels at dimension 1.
    """
    norm: Any = None if output.batch_norm is None else modules.get(output.batch_norm)
    if norm is not None and folds(norm):
        g, b = (value.to(y.dtype).reshape(-1, *(1,) * (y.dim() - 2)) for value in folded_numbers(norm))
        y = y * g.to(y.device) + b.to(y.device)
    return y if output.lower is None and output.upper is None else y.clamp(output.lower, output.upper)
