"""Which class replaces which: one dict, one decorator, keyed by exact type.

A subclass of `nn.Conv2d` that computes as `nn.Conv2d` does - it adds a constructor, a method, or its weight is
parametrized - gets a quantized class derived from its own. One with a forward of its own is *not* a `Conv2d` here:
swapping it would lose that forward. It gets an entry of its own, or its forward is rewritten (`daqconvert.graph`).
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from daqconvert.layers.base import QuantizedLayer
from daqconvert.layers.computed import plain_class
from daqconvert.layers.frozen import FrozenLayer

C = TypeVar("C", bound=type)

_QUANTIZED: dict[type[nn.Module], type[QuantizedLayer]] = {}
_FROZEN: dict[type[nn.Module], type[FrozenLayer]] = {}
_REGISTERED: set[type[nn.Module]] = set()
_COMPUTING = ("__call__", "_call_impl", "forward", "_conv_forward", "_output_padding")

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
        _REGISTERED.add(original)
        return cls

    return add


def quantized_class(original: type[nn.Module]) -> type[QuantizedLayer] | None:
    """Return the quantized form of exactly this class, or None; made on demand where it computes as its base does."""
    base = _computes_as(original)
    if base is not None and original not in _QUANTIZED:
        _QUANTIZED[original] = _derive(_QUANTIZED[base], QuantizedLayer, original, "Quant")
    return _QUANTIZED.get(original)


def frozen_class(original: type[nn.Module]) -> type[FrozenLayer]:
    """Return the frozen form of exactly this class; it needs no parametrization any more."""
    base = _computes_as(original)
    plain = plain_class(original)
    if base is not None and plain not in _FROZEN:
        _FROZEN[plain] = _derive(_FROZEN[base], FrozenLayer, plain, "Frozen")
    return _FROZEN[plain]


def _computes_as(original: type[nn.Module]) -> type[nn.Module] | None:
    """The registered class whose forward this one has, itself included."""
    _load_adapters()
    for base in original.__mro__:
        if base in _REGISTERED:
            same = all(getattr(original, name, None) is getattr(base, name, None) for name in _COMPUTING)
            return base if same else None
    return None


def _derive(form: type[Any], mixin: type[nn.Module], original: type[nn.Module], prefix: str) -> type[Any]:
    """Return `form`'s operation and `mixin` in front of `original`."""
    operation = tuple(base for base in form.__bases__ if not issubclass(base, nn.Module))
    body = {"original": original, "__reduce_ex__": _reduce, "__module__": original.__module__}
    return type(f"{prefix}{original.__name__}", (*operation, mixin, original), body)


def _reduce(self: Any, protocol: Any) -> Any:
    """Pickle by the original class: the derived one is made again where it is read."""
    return _remake, (type(self).original, isinstance(self, FrozenLayer)), self.__dict__


def _remake(original: type[nn.Module], frozen: bool) -> Any:
    cls = frozen_class(original) if frozen else quantized_class(original)
    assert cls is not None
    return cls.__new__(cls)


def _load_adapters() -> None:
    """Register the layers of a library only once that library is in use: importing it here would cost seconds."""
    if "timm" in sys.modules:
        importlib.import_module("daqconvert.layers.timm")


def is_site_type(module: nn.Module) -> bool:
    """Whether a module multiplies by a weight of its own: a convolution, linear or recurrent layer."""
    return isinstance(module, SITE_BASES)
