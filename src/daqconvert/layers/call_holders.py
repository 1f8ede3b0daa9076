"""Call sites: sites that are function calls, such as `F.linear(x, self.kernel)` or `x @ self.proj`, and their holders.

A rewritten forward (`daqconvert.graph.rewrite`) calls `call_site(holder, ...)` in place of the function.
The holder is the module that has the site's quantizers or codes: a layer whose weight the call uses, the rewritten
module itself (`OwnCallHolder`), or a new module next to a bare parameter (`CallHolder`).

Some functions get a weight and multiply by it inside, where torch.fx cannot follow: torchvision's
`shifted_window_attention(x, self.qkv.weight, self.proj.weight, ...)` branches on shapes, so it stays one node of the
graph. The rewritten forward gives such a function a `SiteWeight` instead of the weight. torch calls
`SiteWeight.__torch_function__` in place of every function that receives the object, so that the site computes every
multiplication by the weight. A function that only moves elements of the weight before that, such as `rel_pos[index]`
or a transpose, is remembered and applied to the operand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from daqconvert.errors import ConversionError
from daqconvert.layers.frozen_site import FrozenSite
from daqconvert.layers.functions import ALIASES, FUNCTIONS, LAYER_FUNCTIONS, output_dims, split_call
from daqconvert.layers.mode import evaluating
from daqconvert.layers.site import QuantizedSite, bits_text


def call_site(holder: Any, function: str, weight_at: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return what the call `FUNCTIONS[function](*args, **kwargs)` returns, computed by the site of its holder.

    Operand `weight_at` (0 or 1) is the weight; it may be None if the holder has codes. If the holder is neither a
    `QuantizedSite` nor a `FrozenSite`, the function itself is called.
    """
    parts = split_call(function, weight_at, args, kwargs)
    if isinstance(holder, FrozenSite):
        return parts.written(holder.run(parts.x, parts.weight, parts.bias, parts.operation))
    if not isinstance(holder, QuantizedSite):
        return FUNCTIONS[function](*args, **kwargs)

    def plain(x: Tensor) -> Tensor:
        # NOTE: makes the original call where it can, because the sum in two steps may round in another order
        if x is parts.x:
            return FUNCTIONS[function](*args, **kwargs)
        return with_bias(parts.operation(x, parts.weight), parts.bias, output_dims(function))

    return parts.written(holder.run(parts.x, parts.weight, parts.bias, parts.operation, plain))


def with_bias(y: Tensor, bias: Tensor | None, dims: int) -> Tensor:
    """Return `y + bias`, where `dims` dimensions of `y` follow the channel; `y` itself if there is no bias."""
    return y if bias is None else y + _aligned(bias, dims)


def _aligned(bias: Any, dims: int) -> Any:
    """Return a bias of one value per channel in the shape that broadcasts against an output."""
    return bias.reshape(-1, *(1,) * dims) if dims and bias is not None else bias


WeightOf = Callable[[nn.Module], Tensor]
"""Computes a call's weight from the module whose forward makes the call."""


class CallHolder(QuantizedSite):
    """Holds the quantizers of a call site whose weight belongs to no layer.

    Attributes:
        source: The module that makes the call, and the function that computes the weight from it; None if the weight
            depends on the data.
    """

    source: tuple[nn.Module, WeightOf] | None

    def float_weight(self) -> Tensor | None:
        """Return the weight as the original computes it; None if it depends on the data."""
        if self.source is None:
            return None
        module, weight_of = self.source
        with evaluating(module):
            return weight_of(module)

    def extra_repr(self) -> str:
        """Return the bits."""
        return bits_text(self.settings)


class FrozenCallHolder(FrozenSite):
    """The frozen form of `CallHolder`."""

    def extra_repr(self) -> str:
        """Return the bits."""
        return f"{bits_text(self.settings)}, frozen"


class OwnCallHolder(QuantizedSite):
    """Mixin of a rewritten module that holds the quantizers of its own weight.

    Attributes:
        weight_of: Computes the weight from the module.
    """

    weight_of: WeightOf

    def float_weight(self) -> Tensor:
        """Return the weight as the original computes it."""
        with evaluating(self):
            return self.weight_of(self)


def handle(holder: Any, weight: Tensor | None = None) -> Any:
    """Return a `SiteWeight` to pass to a function, or the weight itself if the holder has no quantizers or codes.

    `weight` is None if the holder is a layer and the weight is its own.
    """
    if isinstance(holder, (QuantizedSite, FrozenSite)):
        return SiteWeight(holder, weight)
    return holder.weight if weight is None else weight


Move = Callable[[Tensor], Tensor]
MOVES = {Tensor.__getitem__, Tensor.transpose, Tensor.t, Tensor.permute, Tensor.reshape, Tensor.view, Tensor.flatten}
MOVES |= {torch.transpose, torch.t, torch.permute, torch.reshape, torch.flatten, torch.index_select, Tensor.unsqueeze}


class SiteWeight:
    """Stands for the weight of a site: the site computes products with it; other functions get the weight itself.

    Attributes:
        holder: A quantized or frozen site.
        weight: The weight; None if the holder is a layer and the weight is its own.
        move: Applies to the weight all moves of elements so far (transposes, indexing, ...).
        whole: Whether there were none.
    """

    def __init__(self, holder: Any, weight: Tensor | None = None, move: Move | None = None) -> None:
        self.holder, self.weight, self.whole = holder, weight, move is None
        self.move: Move = move or (lambda weight: weight)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Let the site compute a product with its weight; call any other function with the weight itself."""
        return cls._called(func, args, kwargs or {})

    @staticmethod
    def _called(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = ALIASES.get(func)
        if func in MOVES and isinstance(args[0], SiteWeight):
            return args[0].moved(lambda weight: func(weight, *args[1:], **kwargs))
        if name is not None and sum(isinstance(leaf, SiteWeight) for leaf in tree_leaves((args, kwargs))) == 1:
            return _product(name, args, kwargs)
        args, kwargs = tree_map_only(SiteWeight, SiteWeight.value, (args, kwargs))
        return func(*args, **kwargs)

    def moved(self, move: Move) -> SiteWeight:
        """Return a `SiteWeight` of the same weight with one more move of its elements."""
        before = self.move
        return SiteWeight(self.holder, self.weight, lambda weight: move(before(weight)))

    def value(self) -> Tensor:
        """Return the weight in real units after all moves of its elements."""
        return self.move(self.value_before_moves())

    def value_before_moves(self) -> Tensor:
        """Return the weight in real units as the module stores it."""
        found: Tensor = self.holder.weight if self.weight is None else self.weight
        return found

    def __getitem__(self, index: Any) -> SiteWeight:
        return self.moved(lambda weight: weight[index])

    def __getattr__(self, name: str) -> Any:
        if name in ("T", "mT"):
            return self.moved(lambda weight: getattr(weight, name))
        method = getattr(Tensor, name, None)
        if callable(method) and (method in MOVES or method in ALIASES):
            return lambda *args, **kwargs: SiteWeight._called(method, (self, *args), kwargs)
        return getattr(self.value(), name)


def _product(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the product of the call `FUNCTIONS[name](*args, **kwargs)`, computed by the site of its `SiteWeight`."""
    weight_at = 1 if name in LAYER_FUNCTIONS else _position(name, args, kwargs)
    parts = split_call(name, weight_at, args, kwargs)
    if not isinstance(parts.weight, SiteWeight):  # the SiteWeight is the bias or the input
        return FUNCTIONS[name](*args, **kwargs)
    holder, move = parts.weight.holder, parts.weight.move

    dims = output_dims(name)
    _check_channels(name, parts.weight)

    def operation(x: Tensor, weight: Tensor) -> Tensor:
        return parts.operation(x, move(weight))

    # a bare parameter's holder does not know which function multiplies by it
    bias = parts.bias if holder.output_dims else _aligned(parts.bias, dims)
    weight: Tensor | None = parts.weight.weight
    if isinstance(holder, FrozenSite):
        if holder.settings.w_bits is None:
            weight = parts.weight.value_before_moves()
        return holder.run(parts.x, weight, bias, operation)
    weight = value = parts.weight.value_before_moves()
    args, kwargs = tree_map_only(SiteWeight, SiteWeight.value, (args, kwargs))

    def plain(x: Tensor) -> Tensor:
        return FUNCTIONS[name](*args, **kwargs) if x is parts.x else with_bias(operation(x, value), parts.bias, dims)

    return holder.run(parts.x, weight, bias, operation, plain)


def _check_channels(name: str, weight: SiteWeight) -> None:
    """Raise if a layer's weight has a scale per channel, and a product has its output channels along another axis."""
    holder = weight.holder
    transposed = bool(getattr(holder, "transposed", False))
    layered = name in LAYER_FUNCTIONS and name.startswith("conv_transpose") == transposed
    if holder.settings.granularity == "channel" and not (layered and weight.whole):
        raise ConversionError(
            f"{holder.layer_name}: expected a helper function to multiply by its weight as the layer does, "
            f"found {name} along another axis, where a scale per channel would be wrong. Give the layer one scale, "
            f'rules=[daqconvert.Rule({{"granularity": "tensor"}}, match="{holder.layer_name}")], or leave it alone, '
            f'exclude=["{holder.layer_name}"].'
        )


def _position(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Return which operand of a matrix product is the `SiteWeight`, 0 or 1."""
    operands = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, (Tensor, SiteWeight))][-2:]
    return int(isinstance(operands[1], SiteWeight))
