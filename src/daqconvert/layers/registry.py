"""Which class replaces which: one dict, one decorator, keyed by exact type.

A subclass of `nn.Conv2d` with a forward of its own is *not* a `Conv2d` here: swapping it would lose that forward. It
gets an entry of its own, or is left alone with its reason in the plan.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import TypeVar

from torch import nn

from daqconvert.layers.base import QuantizedLayer
from daqconvert.layers.frozen import FrozenLayer

C = TypeVar("C", bound=type)

_QUANTIZED: dict[type[nn.Module], type[QuantizedLayer]] = {}
_FROZEN: dict[type[nn.Module], type[FrozenLayer]] = {}

SITE_BASES: tuple[type[nn.Module], ...] = (
    nn.Linear,
    nn.Bilinear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.MultiheadAttention,
    nn.RNNBase,
    nn.RNNCellBase,
)


def register(original: type[nn.Module]) -> Callable[[C], C]:
    """Register a class as the quantized or frozen form of exactly `original`.

    The class names an operation mixin, the state mixin, and the original class, in that order:

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
        table = _FROZEN if issubclass(cls, FrozenLayer) else _QUANTIZED
        table[original] = cls
        return cls

    return add


def quantized_class(original: type[nn.Module]) -> type[QuantizedLayer] | None:
    """Return the quantized form of exactly this class, or None."""
    _load_adapters()
    return _QUANTIZED.get(original)


def frozen_class(original: type[nn.Module]) -> type[FrozenLayer]:
    """Return the frozen form of exactly this class."""
    _load_adapters()
    return _FROZEN[original]


def _load_adapters() -> None:
    """Register the layers of a library only once that library is in use: importing it here would cost seconds."""
    if "timm" in sys.modules:
        importlib.import_module("daqconvert.layers.timm")


def is_site_type(module: nn.Module) -> bool:
    """Whether a module multiplies by a weight of its own: a convolution, linear, attention block, recurrent layer."""
    return isinstance(module, SITE_BASES)
