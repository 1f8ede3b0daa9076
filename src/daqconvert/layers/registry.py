"""The registry of layer classes: one dict of quantized and one of frozen classes, keyed by the exact float class.

A subclass of `nn.Conv2d` that computes as `nn.Conv2d` does (it adds a constructor or a method, or its weight is
parametrized) gets a quantized class derived from its own (`lookup`). A subclass with a forward of its own is not a
`Conv2d` here, because replacing it would lose that forward. Such a class is registered itself, or its forward is
rewritten (`daqconvert.graph.rewrite`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import nn

from daqconvert.layers.base import QuantizedLayer
from daqconvert.layers.frozen import FrozenLayer

C = TypeVar("C", bound=type)

QUANTIZED: dict[type[nn.Module], type[QuantizedLayer]] = {}
FROZEN: dict[type[nn.Module], type[FrozenLayer]] = {}
REGISTERED: set[type[nn.Module]] = set()

SITE_BASES: tuple[type[nn.Module], ...] = (
    nn.Linear,
    nn.Bilinear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.RNNBase,
    nn.RNNCellBase,
)


def register(original: type[nn.Module]) -> Callable[[C], C]:
    """Register a class as the quantized or frozen form of exactly `original`.

    The bases of the class are an operation mixin, the state mixin, and the original class, in that order:

        class LinearOp:
            output_dims = 0                         # dimensions after the channel in the output

            def accumulate(self, x, w, *args):      # the operation alone: no bias, no scale
                return F.linear(x, w)

        @register(nn.Linear)
        class QuantLinear(LinearOp, QuantizedLayer, nn.Linear): ...

        @register(nn.Linear)
        class FrozenLinear(LinearOp, FrozenLayer, nn.Linear): ...

    Args:
        original: The float class; matched exactly, not by `isinstance`.
    """

    def add(cls: C) -> C:
        table = FROZEN if issubclass(cls, FrozenLayer) else QUANTIZED
        table[original] = cls
        REGISTERED.add(original)
        return cls

    return add


def is_site_type(module: nn.Module) -> bool:
    """Whether a module multiplies by a weight of its own: a convolution, linear or recurrent layer."""
    return isinstance(module, SITE_BASES)
