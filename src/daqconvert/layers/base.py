"""A quantized layer: a convolution or linear whose forward computes from integer-valued operands."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from daqconvert.errors import ConversionError
from daqconvert.layers.mode import evaluating
from daqconvert.layers.site import Operation, QuantizedSite, bits_text
from daqconvert.quantizers import ChannelLayout
from daqconvert.spec import Settings


class BareOperation:
    """Mixin of quantized and frozen layers: the operation without bias or scale, which a family defines.

    A family defines `accumulate(x, w, *args)`. It may also define `products(*args)`, which returns an operation whose
    gradients are known (`functional.products`) and is preferred. If a subclass or an instance overrides `accumulate`,
    the override is used instead of both.
    """

    _gives_products: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        owner = next(c for c in cls.__mro__ if "accumulate" in vars(c) or "products" in vars(c))
        cls._gives_products = "products" in vars(owner)

    def bare_operation(self, *args: Any, **kwargs: Any) -> Operation:
        """Return the operation of one call, whose arguments after the input are `args` and `kwargs`."""
        if self._gives_products and "accumulate" not in self.__dict__:
            found: Operation = self.products(*args, **kwargs)  # type: ignore[attr-defined]
            return found
        return lambda x, w: self.accumulate(x, w, *args, **kwargs)

    def accumulate(self, x: Tensor, w: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the operation on `x` and `w` without bias or scale; the family's mixin defines it."""
        raise ConversionError(f"{type(self).__name__} has no accumulate(); see daqconvert.layers.register.")


class QuantizedLayer(BareOperation, QuantizedSite):
    """Mixin of the quantized layers: the state of a quantized site, and a forward that calls the bare operation."""

    original: ClassVar[type[nn.Module]]
    output_dims: ClassVar[int]
    weight: Tensor
    bias: Tensor | None

    @classmethod
    def convert(cls, layer: nn.Module, settings: Settings, name: str, signed: bool | None) -> QuantizedLayer:
        """Turn a float layer into its quantized form, in place: parameters, hooks and attributes stay as they are.

        Args:
            layer: A layer of exactly the class that `cls` is registered for.
            settings: Settings with nothing left on `"auto"`.
            name: Dotted name of the layer, for messages.
            signed: Whether the input is signed; None if `calibrate` decides.

        Raises:
            ConversionError: If the weight is empty, not finite, or constant although it must be normalized.
        """
        if type(layer) is not cls.original:
            raise ConversionError(f"{name}: expected exactly {cls.original.__name__}, found {type(layer).__name__}.")
        layer.__class__ = cls
        assert isinstance(layer, cls)
        with evaluating(layer):
            weight = layer.weight
        layer.attach(settings, name, signed, weight, layer.channel_layout(tuple(weight.shape)))
        return layer

    def channel_layout(self, shape: tuple[int, ...]) -> ChannelLayout:
        """Return which dimension of a weight of this shape holds the output channels."""
        return ChannelLayout.forward(shape)

    def float_weight(self) -> Tensor:
        """Return the weight."""
        with evaluating(self):
            return self.weight

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the output computed from integer-valued operands; the original layer's if `enabled` is False."""
        original = super().forward
        if not self.enabled and not self.watchers:  # NOTE: do not read `self.weight`: two reads could change its state
            return original(input, *args, **kwargs)
        return self.run(
            input, self.weight, self.bias, self.bare_operation(*args, **kwargs),
            lambda x: original(x, *args, **kwargs),
        )  # fmt: skip

    def extra_repr(self) -> str:
        """Return the text of the original class and the bits."""
        return f"{super().extra_repr()}, {bits_text(self.settings)}"
