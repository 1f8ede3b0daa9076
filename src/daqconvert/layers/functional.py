"""Sites that are calls: `F.linear(x, self.kernel)`, `x @ self.proj`, a subclass with a convolution in its forward.

A rewritten forward (`daqconvert.graph.rewrite`) calls `call_site(holder, ...)` where the original calls the function.
The holder is a layer whose weight the call uses, the rewritten module itself, or a module beside a bare parameter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from daqconvert.layers.frozen_site import FrozenSite
from daqconvert.layers.mode import evaluating
from daqconvert.layers.operations import FUNCTIONS, split_call
from daqconvert.layers.site import QuantizedSite

WeightOf = Callable[[nn.Module], Tensor]
"""Computes a call's weight from the module whose forward makes the call."""


class FunctionalSite(QuantizedSite):
    """Holds the quantizers of a call whose weight is no layer's.

    Attributes:
        source: The module that makes the call, and how it computes the weight; None where the weight depends on data.
    """

    source: tuple[nn.Module, WeightOf] | None

    def float_weight(self) -> Tensor | None:
        """Return the weight as the original computes it; None where it depends on the data."""
        if self.source is None:
            return None
        module, weight_of = self.source
        with evaluating(module):
            return weight_of(module)

    def extra_repr(self) -> str:
        """Return the bits."""
        return f"w_bits={self.settings.w_bits or 'float'}, a_bits={self.settings.a_bits or 'float'}"


class FrozenFunctionalSite(FrozenSite):
    """The frozen form of `FunctionalSite`."""

    def extra_repr(self) -> str:
        """Return the bits."""
        return f"w_bits={self.settings.w_bits or 'float'}, a_bits={self.settings.a_bits or 'float'}, frozen"


class OwnSite(QuantizedSite):
    """Mixin of a rewritten layer that holds the quantizers of its own weight.

    Attributes:
        weight_of: Computes the weight from the layer.
    """

    weight_of: WeightOf

    def float_weight(self) -> Tensor:
        """Return the weight as the original computes it."""
        with evaluating(self):
            return self.weight_of(self)


def call_site(holder: Any, function: str, weight_at: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Compute what a function computes, quantized by what the holder says.

    Args:
        holder: A `QuantizedSite`, a `FrozenSite`, or any other module: then the function itself is called.
        function: A name of `daqconvert.layers.operations.FUNCTIONS`.
        weight_at: Which of the two operands is the weight, 0 or 1.
        args: Of the original call; the weight is None where the holder has codes.
        kwargs: Of the original call.
    """
    parts = split_call(function, weight_at, args, kwargs)
    if isinstance(holder, FrozenSite):
        return holder.run(parts.x, parts.weight, parts.bias, parts.operation)
    if not isinstance(holder, QuantizedSite):
        return FUNCTIONS[function](*args, **kwargs)

    def plain(x: Tensor) -> Tensor:
        # NOTE: the call as it stands in the original, for `operation` adds no bias and may sum in another order
        return FUNCTIONS[function](*args, **kwargs) if x is parts.x else parts.operation(x, parts.weight)

    return holder.run(parts.x, parts.weight, parts.bias, parts.operation, plain)
