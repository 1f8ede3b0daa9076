"""The state and forward that all frozen layers share: uint8 codes instead of a weight, scales instead of bounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from daqconvert.errors import FrozenError
from daqconvert.functional.grid import weight_codes, weight_operand
from daqconvert.layers.base import QuantizedLayer, accumulate_safely, rescale
from daqconvert.quantizers import ChannelLayout
from daqconvert.spec import Settings


class FrozenLayer(nn.Module):
    """Mixin of the frozen layers: integer codes, one scale per output channel or tensor; computes, never trains.

    Attributes:
        weight: What the codes stand for, in real units, computed on every access: to look at, and for code that asks a
            layer for its dtype, device or shape. Forward does not read it.
        weight_codes: uint8 buffer `0 .. 2**w_bits - 1`, shape of the weight; absent where the weight stays float.
        scale: float32 buffer, `()` or `(C_out,)`: what one unit of the integer sum is worth.
        input_scale: float32 scalar buffer; absent where the input stays float.
        input_zero_point: uint8 scalar buffer, likewise.
        settings: What the plan's row said.
        qdq: True writes operands and rescaling as one operator each (`daqconvert.deploy.operators`), for export alone;
            the values are the same.
    """

    original: ClassVar[type[nn.Module]]
    output_dims: ClassVar[int]
    bias: Tensor | None
    weight_codes: Tensor
    scale: Tensor
    input_scale: Tensor
    input_zero_point: Tensor
    settings: Settings
    layer_name: str
    qdq: bool
    dtype: torch.dtype

    @classmethod
    def freeze(cls, layer: QuantizedLayer) -> FrozenLayer:
        """Turn a quantized layer into its frozen form, in place."""
        settings, name = layer.settings, layer.layer_name
        buffers: dict[str, Tensor] = {}
        with torch.no_grad():
            buffers["scale"] = layer.combined_scale().clone()
            if layer.weight_quantizer is not None:
                operand = layer.weight_quantizer(layer.weight)
                buffers["weight_codes"] = weight_codes(operand, layer.weight_quantizer.bits, settings.grid)
            if layer.input_quantizer is not None:
                buffers["input_scale"] = layer.input_quantizer.scale().clone()
                buffers["input_zero_point"] = layer.input_quantizer.zero_point().to(torch.uint8)
        for child in ("weight_quantizer", "input_quantizer"):
            layer.__dict__.pop(child, None)
            layer._modules.pop(child, None)
        del layer.output_scale, layer.enabled
        return cls.adopt(layer, settings, name, buffers)

    @classmethod
    def skeleton(cls, layer: nn.Module, settings: Settings, name: str) -> FrozenLayer:
        """Turn a float layer into an empty frozen one, in place: shapes are right, values are to be loaded."""
        weight, one = layer.weight, torch.ones((), dtype=torch.float32)
        assert isinstance(weight, Tensor)
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        channels = cls._channels(layer)
        per_channel = settings.granularity == "channel"
        buffers = {"scale": torch.ones((channels,) if per_channel else (), dtype=wide, device=weight.device)}
        if settings.w_bits is not None:
            buffers["weight_codes"] = torch.zeros(weight.shape, dtype=torch.uint8, device=weight.device)
        if settings.a_bits is not None:
            buffers["input_scale"] = one.to(weight.device, wide)
            buffers["input_zero_point"] = torch.zeros((), dtype=torch.uint8, device=weight.device)
        return cls.adopt(layer, settings, name, buffers)

    @classmethod
    def adopt(cls, layer: nn.Module, settings: Settings, name: str, buffers: dict[str, Tensor]) -> FrozenLayer:
        """Make `layer` an instance of this class that holds `buffers` and, where codes replace it, no weight."""
        weight = layer.weight
        assert isinstance(weight, Tensor)
        if "weight_codes" in buffers:
            del layer.weight
        layer.__class__ = cls
        assert isinstance(layer, cls)
        layer.settings, layer.layer_name, layer.qdq, layer.dtype = settings, name, False, weight.dtype
        for key, value in buffers.items():
            layer.register_buffer(key, value)
        layer.requires_grad_(False)
        return layer

    def _dequantized_weight(self) -> Tensor:
        stored = self._parameters.get("weight")
        if stored is not None:
            return stored
        layout = self.channel_layout(tuple(self.weight_codes.shape))
        step = self.scale if self.settings.a_bits is None else self.scale / self.input_scale
        step = step.reshape(layout.bound_view) if step.dim() else step
        codes = self.weight_codes.reshape(layout.view)
        values = weight_operand(codes, self.settings.w_bits or 0, self.settings.grid, step.dtype) * step
        return values.reshape(self.weight_codes.shape).to(self.dtype)

    # a property in all but mypy's eyes, to whom it is the attribute that torch's classes declare
    weight: Tensor = property(_dequantized_weight)  # type: ignore[assignment]

    def channel_layout(self, shape: tuple[int, ...]) -> ChannelLayout:
        """Return where the output channels of a weight of this shape are."""
        return ChannelLayout.forward(shape)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenLayer:
        """Move or cast, as `.to()` and `.half()` do; scales stay float32 at least, as when a half model is frozen."""
        scales = {key: self._buffers[key] for key in ("scale", "input_scale") if key in self._buffers}
        super()._apply(fn, recurse)
        for key, before in scales.items():
            after = self._buffers[key]
            if before is not None and after is not None and after.dtype in (torch.float16, torch.bfloat16):
                self._buffers[key] = before.to(after.device, torch.float32)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self

    @classmethod
    def _channels(cls, layer: nn.Module) -> int:
        return int(getattr(layer, "out_channels", 0) or getattr(layer, "out_features", 0))

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the layer's output from integer operands.

        Raises:
            FrozenError: In training mode.
        """
        if self.training:
            raise FrozenError(_no_training(self.layer_name))
        x = input if self.settings.a_bits is None else self.input_operand(input)
        w = self._parameters["weight"] if self.settings.w_bits is None else self.weight_operand()
        assert w is not None
        acc, scale = accumulate_safely(self, x, w, self.scale, self.settings, *args, **kwargs)
        if self.qdq:
            return torch.ops.daqconvert.rescale(acc, scale, self.bias, self.output_dims, self.layer_name)
        return rescale(acc, scale, self.bias, self.output_dims, acc.dtype)

    def input_operand(self, x: Tensor) -> Tensor:
        """Return `q - zero_point` of an input, integer-valued, in its dtype."""
        assert self.settings.a_bits is not None
        if self.qdq:
            return torch.ops.daqconvert.input_operand(
                x, self.input_scale, self.input_zero_point, self.settings.a_bits, self.layer_name
            )
        return input_operand(x, self.input_scale, self.input_zero_point, self.settings.a_bits)

    def input_codes(self, x: Tensor) -> Tensor:
        """Return the codes `0 .. 2**a_bits - 1` of an input, uint8."""
        return (self.input_operand(x) + self.input_zero_point).to(torch.uint8)

    def weight_operand(self) -> Tensor:
        """Return the integer-valued weight operand in the model's dtype."""
        assert self.settings.w_bits is not None
        if self.qdq:
            return torch.ops.daqconvert.weight_operand(
                self.weight_codes, self.settings.w_bits, self.settings.grid, self.layer_name
            )
        return weight_operand(self.weight_codes, self.settings.w_bits, self.settings.grid, self.dtype)

    def train(self, mode: bool = True) -> FrozenLayer:
        """Set evaluation mode.

        Raises:
            FrozenError: If asked for training mode.
        """
        super().train(mode)
        if mode:
            raise FrozenError(_no_training(self.layer_name))
        return self

    def extra_repr(self) -> str:
        """Return the original's text and the bits."""
        w, a = self.settings.w_bits or "float", self.settings.a_bits or "float"
        return f"{super().extra_repr()}, w_bits={w}, a_bits={a}, frozen"


def input_operand(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Return `clip(round(x / scale), -zero_point, n - zero_point)`, integer-valued, in the dtype of `x`.

    Args:
        x: Any shape, any floating dtype; arithmetic in float32 at least.
        scale: Scalar, the step between two levels.
        zero_point: Scalar, uint8.
        bits: 1 to 8; `n = 2**bits - 1`.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    low = zero_point.to(wide.dtype)
    return torch.clamp(wide / scale, -low, (2**bits - 1) - low).round_().to(x.dtype)


def _no_training(name: str) -> str:
    return (
        f"{name or '(root)'}: a frozen layer holds integer codes and cannot be trained. Call .eval() on the model; "
        "to train on, go back to the quantized model (or its checkpoint) and freeze it again."
    )
