"""Finds the quantized or frozen class of a float class: the registered one, or one derived from it on demand."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from torch import nn

from daqconvert.layers.base import QuantizedLayer
from daqconvert.layers.computed import plain_class
from daqconvert.layers.frozen import FrozenLayer
from daqconvert.layers.registry import FROZEN, QUANTIZED, REGISTERED

_COMPUTING = ("__call__", "_call_impl", "forward", "_conv_forward", "_output_padding")


def quantized_class(original: type[nn.Module]) -> type[QuantizedLayer] | None:
    """Return the quantized form of exactly this class, or None if there is none.

    If the class uses the forward of a registered base unchanged, its quantized form is derived on demand.
    """
    base, plain = _computes_as(original), plain_class(original)
    if base is not None and plain is not original:
        return _parametrized(quantized_class(plain), original)
    if base is not None and original not in QUANTIZED:
        QUANTIZED[original] = _derive(QUANTIZED[base], QuantizedLayer, original, "Quant")
    return QUANTIZED.get(original)


def frozen_class(original: type[nn.Module]) -> type[FrozenLayer]:
    """Return the frozen form of exactly this class; a parametrized class counts as the class it was made from."""
    base = _computes_as(original)
    plain = plain_class(original)
    if base is not None and plain not in FROZEN:
        FROZEN[plain] = _derive(FROZEN[base], FrozenLayer, plain, "Frozen")
    return FROZEN[plain]


def _computes_as(original: type[nn.Module]) -> type[nn.Module] | None:
    """Return the registered class (`original` or a base) whose forward `original` uses unchanged; None without one."""
    _load_adapters()
    for base in original.__mro__:
        if base in REGISTERED:
            same = all(getattr(original, name, None) is getattr(base, name, None) for name in _COMPUTING)
            return base if same else None
    return None


def _derive(form: type[Any], mixin: type[nn.Module], original: type[nn.Module], prefix: str) -> type[Any]:
    """Return a class whose bases are the operation mixin of `form`, then `mixin`, then `original`."""
    operation = tuple(base for base in form.__bases__ if not issubclass(base, nn.Module))
    body = {"original": original, "__reduce_ex__": _reduce, "__module__": original.__module__}
    return type(f"{prefix}{original.__name__}", (*operation, mixin, original), body)


def _parametrized(form: Any, original: type[nn.Module]) -> type[Any]:
    """Return a class over the quantized form of a plain class that is built as torch's `parametrize` builds its own.

    torch can then remove the parametrization: it deletes the property from the layer's class and gives the layer the
    first base. The class is new on every call, because torch changes it.
    """
    own = {key: value for key, value in vars(original).items() if key not in ("__dict__", "__weakref__")}
    return type(f"Parametrized{form.__name__}", (form,), {**own, "original": original})


def _reduce(self: Any, protocol: Any) -> Any:
    """Pickle by the original class; the derived class is made again when the pickle is read."""
    return _remake, (type(self).original, isinstance(self, FrozenLayer)), self.__dict__


def _remake(original: type[nn.Module], frozen: bool) -> Any:
    cls = frozen_class(original) if frozen else quantized_class(original)
    assert cls is not None
    return cls.__new__(cls)


def _load_adapters() -> None:
    """Register the layers of timm only if timm has been imported already, because importing it takes seconds."""
    if "timm" in sys.modules:
        importlib.import_module("daqconvert.layers.timm")
