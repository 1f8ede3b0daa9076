"""The state and forward that all quantized layers share.

    y = conv(q_x - zero_point, operand_w) * S + bias,   S = |output_scale| * weight multiplier * input multiplier

The operands are integer-valued, all scales come after the sum, the bias stays float and is added last.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from daqconvert.errors import ConversionError
from daqconvert.functional.grid import levels
from daqconvert.quantizers import ChannelLayout, InputQuantizer, WeightQuantizer
from daqconvert.spec import Settings


class QuantizedLayer(nn.Module):
    """Mixin of the quantized layers: quantizers, output scale, and the forward built from `accumulate`.

    Attributes:
        weight_quantizer: Or None where the weight stays float.
        input_quantizer: Or None where the input stays float.
        output_scale: Parameter of shape `()` or `(C_out,)`.
        settings: What the plan's row said.
        enabled: False computes what the original layer computes with the current weights.

    Reference: METHOD of the paper, "Distance-aware Quantization" (Kim, Lee, Ham, ICCV 2021), section 3.3.
    """

    original: ClassVar[type[nn.Module]]
    output_dims: ClassVar[int]
    weight: Tensor
    bias: Tensor | None
    weight_quantizer: WeightQuantizer | None
    input_quantizer: InputQuantizer | None
    output_scale: nn.Parameter
    settings: Settings
    layer_name: str
    enabled: bool

    @classmethod
    def convert(cls, layer: nn.Module, settings: Settings, name: str, signed: bool | None) -> QuantizedLayer:
        """Turn a float layer into its quantized form, in place: parameters, hooks and attributes stay as they are.

        Args:
            layer: Of exactly the class that `cls` is registered for.
            settings: With nothing left on `"auto"`.
            name: Its dotted name, for messages.
            signed: Sign of its input, None for undecided.

        Raises:
            ConversionError: If the weight is empty, not finite, or constant where it must be normalized.
        """
        if type(layer) is not cls.original:
            raise ConversionError(f"{name}: expected exactly {cls.original.__name__}, found {type(layer).__name__}.")
        layer.__class__ = cls
        assert isinstance(layer, cls)
        layer._attach(settings, name, signed)
        return layer

    def _attach(self, settings: Settings, name: str, signed: bool | None) -> None:
        layout = self.channel_layout(tuple(self.weight.shape))
        self.settings, self.layer_name, self.enabled = settings, name, True
        has_weight, has_input = settings.w_bits is not None, settings.a_bits is not None
        self.weight_quantizer = WeightQuantizer(settings, layout, name, self.weight) if has_weight else None
        self.input_quantizer = InputQuantizer(settings, signed, name, self.weight) if has_input else None
        shape = (layout.channels,) if settings.granularity == "channel" else ()
        self.output_scale = nn.Parameter(torch.ones(shape, dtype=self.weight.dtype, device=self.weight.device))
        if self.weight_quantizer is not None and not self.weight.is_meta:
            self.weight_quantizer.initialize(self.weight)
        self.train(self.training)

    def channel_layout(self, shape: tuple[int, ...]) -> ChannelLayout:
        """Return where the output channels of a weight of this shape are."""
        return ChannelLayout.forward(shape)

    @property
    def unitless(self) -> bool:
        """Whether operands count in parts of full range, as the paper's do, and `output_scale` carries the units."""
        return self.weight_quantizer is not None and self.weight_quantizer.normalize

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the layer's output from integer-valued operands; the original's where `enabled` is False."""
        if not self.enabled:
            return super().forward(input, *args, **kwargs)
        x = input if self.input_quantizer is None else self.input_quantizer(input)
        w = self.weight if self.weight_quantizer is None else self.weight_quantizer(self.weight)
        acc, scale = self.products(x, w, self.combined_scale(), *args, **kwargs)
        return rescale(acc, scale, self.bias, self.output_dims, acc.dtype)

    def combined_scale(self) -> Tensor:
        """Return `S = |output_scale| * weight multiplier * input multiplier`, shape of `output_scale`, float32."""
        scale = self.output_scale.abs()
        scale = scale if scale.dtype == torch.float64 else scale.float()
        if self.weight_quantizer is not None:
            scale = scale * self.weight_quantizer.multiplier()
        if self.input_quantizer is not None:
            n = 2**self.input_quantizer.bits - 1
            scale = scale * (1.0 / n if self.unitless else self.input_quantizer.scale())
        return scale

    def products(self, x: Tensor, w: Tensor, scale: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return the sums of products and the scale that belongs to them; float16 divides its operands first."""
        return accumulate_safely(self, x, w, scale, self.settings, *args, **kwargs)

    def accumulate(self, x: Tensor, w: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the bare operation, without bias or scale; given by the family's mixin."""
        raise ConversionError(f"{type(self).__name__} has no accumulate(); see daqconvert.layers.register.")

    def extra_repr(self) -> str:
        """Return the original's text and the bits."""
        w, a = self.settings.w_bits or "float", self.settings.a_bits or "float"
        return f"{super().extra_repr()}, w_bits={w}, a_bits={a}"


def input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """Return a layer's input and what else its call was given, for hooks: `layer(x)` and `layer(input=x)` are one."""
    if args:
        return args[0], args[1:], kwargs
    return kwargs["input"], (), {key: value for key, value in kwargs.items() if key != "input"}


def accumulate_safely(
    layer: Any, x: Tensor, w: Tensor, scale: Tensor, settings: Settings, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """Return `layer.accumulate(x, w)` and its scale; float16 overflows at 65504, so there operands are fractions."""
    half = x.dtype == torch.float16 or (
        torch.is_autocast_enabled(x.device.type) and torch.get_autocast_dtype(x.device.type) == torch.float16
    )
    if half:
        if settings.a_bits is not None:
            n = 2**settings.a_bits - 1
            x, scale = x / n, scale * n
        if settings.w_bits is not None:
            top = levels(settings.w_bits, settings.grid)
            w, scale = w / top, scale * top
    return layer.accumulate(x, w, *args, **kwargs), scale


def rescale(acc: Tensor, scale: Tensor, bias: Tensor | None, output_dims: int, dtype: torch.dtype) -> Tensor:
    """Return `acc * scale + bias` in float32 (float64 for float64), as `dtype`.

    Args:
        acc: Sums of products, channel at dimension `-1 - output_dims`.
        scale: `()` or `(C_out,)`.
        bias: `(C_out,)` or None.
        output_dims: Number of dimensions after the channel.
        dtype: Of the result.
    """
    trailing = (1,) * output_dims
    wide = acc if acc.dtype == torch.float64 else acc.float()
    out = wide * (scale.reshape(-1, *trailing) if scale.dim() else scale)
    if bias is not None:
        out = out + (bias if bias.dtype == out.dtype else bias.to(out.dtype)).reshape(-1, *trailing)
    return out.to(dtype)
