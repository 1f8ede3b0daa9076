"""The state that every frozen site shares: uint8 codes instead of a weight, scales instead of bounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from daqconvert.errors import FrozenError
from daqconvert.functional.inference import decoded_weight, input_operand, only_values
from daqconvert.functional.products import KNOWN, PaddedProducts
from daqconvert.functional.scaled import can_fuse, rescale_
from daqconvert.layers import integer_run
from daqconvert.layers.operand_cache import OperandCache
from daqconvert.layers.site import Operation, QuantizedSite, Watcher, rescale, safe_products
from daqconvert.quantizers import ChannelLayout, WeightQuantizer
from daqconvert.spec import Settings

SCALES = ("scale", "input_scale", "weight_scale", "w_scale", "y_scale")
OWN_BUFFERS = ("weight_codes", "scale", "input_scale", "input_zero_point", "weight_scale", "weight_zero_point")
BUFFERS = (*OWN_BUFFERS, *integer_run.BUFFERS)


class FrozenSite(nn.Module):
    """Mixin of everything that holds the codes and scales of a frozen site; computes, never trains.

    Attributes:
        weight_codes: uint8 buffer `0 .. 2**w_bits - 1`, shape of the weight; absent where the weight stays float or
            depends on the data.
        scale: float32 buffer, `()` or `(C_out,)`: what one unit of the integer sum is worth.
        input_scale: float32 scalar buffer; absent where the input stays float.
        input_zero_point: uint8 scalar buffer, likewise.
        weight_scale: float32 scalar buffer, for a weight that depends on the data alone.
        weight_zero_point: uint8 scalar buffer, likewise.
        settings: What the plan's row said.
        dtype: Of the operands.
        qdq: True writes operands and rescaling as one operator each (`daqconvert.deploy.operators`), for export alone;
            the values are the same.
        watchers: What `watching` has attached.
        cache: Keeps the operand of the codes where `keep_operand` has said so, else None.
    """

    weight_codes: Tensor
    scale: Tensor
    input_scale: Tensor
    input_zero_point: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor
    output_dims: int
    settings: Settings
    layer_name: str
    qdq: bool
    dtype: torch.dtype
    watchers: tuple[Watcher, ...]
    cache: OperandCache | None

    def hold(self, settings: Settings, name: str, dtype: torch.dtype, buffers: dict[str, Tensor]) -> None:
        """Take over the values of a frozen site.

        Args:
            settings: Of the plan's row.
            name: Of the site.
            dtype: Of the operands.
            buffers: Some of `BUFFERS`.
        """
        self.settings, self.layer_name, self.qdq, self.dtype, self.watchers = settings, name, False, dtype, ()
        self.cache = None
        for key, value in buffers.items():
            self.register_buffer(key, value)
        self.requires_grad_(False)

    def run(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, operation: Operation) -> Tensor:
        """Return the site's output from integer operands.

        Args:
            x: Float input.
            weight: The float weight, where there are no codes.
            bias: Or None.
            operation: The bare products.

        Raises:
            FrozenError: In training mode.
        """
        if self.training:
            raise FrozenError(no_training(self.layer_name))
        for watcher in self.watchers:
            x = watcher.before(self, x, weight, operation)
        operand = x if self.settings.a_bits is None else self.input_operand(x)
        y = self._output(operand, self.weight_operand(weight), bias, operation)
        for watcher in self.watchers:
            watcher.after(self, y)
        return y

    def _output(self, x: Tensor, w: Tensor, bias: Tensor | None, operation: Operation) -> Tensor:
        """Products of two operands, scale and bias; where the sums are surely nobody else's, in their own memory."""
        if "w_factor" in self._buffers:
            return integer_run.integer_output(self, operation, x, w)
        if isinstance(operation, PaddedProducts):
            x, operation = operation.pad(x), operation.products
        if not self.qdq and can_fuse(operation, x, w, self.scale, bias) and only_values(x, w, self.scale, bias):
            assert isinstance(operation, KNOWN)
            return rescale_(operation(x, w), self.scale, bias, operation.output_dims)
        acc, scale = safe_products(operation, x, w, self.scale, self.settings)
        if self.qdq:
            named: Tensor = torch.ops.daqconvert.rescale(acc, scale, bias, self.output_dims, self.layer_name)
            return named
        return rescale(acc, scale, bias, self.output_dims, acc.dtype)

    def input_operand(self, x: Tensor) -> Tensor:
        """Return `q - zero_point` of an input, integer-valued, in its dtype."""
        return self._operand(x, self.input_scale, self.input_zero_point, self.settings.a_bits, "input")

    def input_codes(self, x: Tensor) -> Tensor:
        """Return the codes `0 .. 2**a_bits - 1` of an input, uint8."""
        return (self.input_operand(x) + self.input_zero_point).to(torch.uint8)

    def weight_operand(self, weight: Tensor | None = None) -> Tensor:
        """Return the integer-valued weight operand in the model's dtype; the weight itself where it stays float.

        Args:
            weight: The float weight, where there are no codes.
        """
        bits = self.settings.w_bits
        if bits is None or "weight_codes" not in self._buffers:
            assert weight is not None
            return weight if bits is None else self._operand(
                weight, self.weight_scale, self.weight_zero_point, bits, "weight"
            )  # fmt: skip
        if self.qdq:
            named: Tensor = torch.ops.daqconvert.weight_operand(
                self.weight_codes, bits, self.settings.grid, self.layer_name
            )
            return named
        decode = decoded_weight if self.cache is None else self.cache.get
        return decode(self.weight_codes, bits, self.settings.grid, self.dtype)

    def keep_operand(self, enabled: bool = True) -> int:
        """Keep the operand of the codes in memory from now on, or no longer; return the bytes it takes."""
        self.cache = OperandCache() if enabled and "weight_codes" in self._buffers else None
        self._renew()
        return 0 if self.cache is None else self.cache.nbytes

    def _renew(self) -> None:
        if self.cache is not None:
            self.cache.get(self.weight_codes, self.settings.w_bits or 0, self.settings.grid, self.dtype)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._renew()

    def _operand(self, x: Tensor, scale: Tensor, zero_point: Tensor, bits: int | None, role: str) -> Tensor:
        assert bits is not None
        if self.qdq:
            name = self.layer_name if role == "input" else f"{self.layer_name}::{role}"
            named: Tensor = torch.ops.daqconvert.input_operand(x, scale, zero_point, bits, name)
            return named
        return input_operand(x, scale, zero_point, bits)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenSite:
        """Move or cast, as `.to()` and `.half()` do; scales stay float32 at least, as when a half model is frozen."""
        scales = {key: self._buffers[key] for key in SCALES if key in self._buffers}
        super()._apply(fn, recurse)
        for key, before in scales.items():
            after = self._buffers[key]
            if before is not None and after is not None and after.dtype in (torch.float16, torch.bfloat16):
                self._buffers[key] = before.to(after.device, torch.float32)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        self._renew()
        return self

    def train(self, mode: bool = True) -> FrozenSite:
        """Set evaluation mode.

        Raises:
            FrozenError: If asked for training mode.
        """
        super().train(mode)
        if mode:
            raise FrozenError(no_training(self.layer_name))
        return self


def frozen_values(site: QuantizedSite) -> dict[str, Tensor]:
    """Return the buffers of a quantized site's frozen form, computed from its weight and bounds.

    Args:
        site: With every quantizer calibrated.
    """
    values: dict[str, Tensor] = {}
    weight_quantizer, input_quantizer = site.weight_quantizer, site.input_quantizer
    with torch.no_grad():
        values["scale"] = site.combined_scale().clone()
        if isinstance(weight_quantizer, WeightQuantizer):
            weight = site.float_weight()
            assert weight is not None
            values["weight_codes"] = weight_quantizer.give_codes(weight)
        for role, quantizer in (("input", input_quantizer), ("weight", weight_quantizer)):
            if quantizer is not None and not isinstance(quantizer, WeightQuantizer):
                values[f"{role}_scale"] = quantizer.scale().clone()
                values[f"{role}_zero_point"] = quantizer.zero_point().to(torch.uint8)
    return values


def empty_values(settings: Settings, weight: Tensor, layout: ChannelLayout | None) -> dict[str, Tensor]:
    """Return buffers of the right shapes for a frozen site whose values are to be loaded.

    Args:
        settings: Of the plan's row.
        weight: The float weight, or a tensor of its dtype and device where it depends on the data.
        layout: Where its output channels are; None for a weight that depends on the data.
    """
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    one = torch.ones((), dtype=wide, device=weight.device)
    zero = torch.zeros((), dtype=torch.uint8, device=weight.device)
    per_channel = settings.granularity == "channel" and layout is not None
    values = {"scale": one.expand(layout.channels).clone() if per_channel and layout is not None else one.clone()}
    # NOTE: in the order of `frozen_values`, so that a loaded model is saved as the same bytes
    if settings.w_bits is not None and layout is not None:
        values["weight_codes"] = torch.zeros(weight.shape, dtype=torch.uint8, device=weight.device)
    if settings.a_bits is not None:
        values |= {"input_scale": one.clone(), "input_zero_point": zero.clone()}
    if settings.w_bits is not None and layout is None:
        values |= {"weight_scale": one.clone(), "weight_zero_point": zero.clone()}
    return values


def drop_quantizers(site: Any) -> None:
    """Take the state of a `QuantizedSite` off a module that is about to be frozen."""
    for child in ("weight_quantizer", "input_quantizer"):
        site.__dict__.pop(child, None)
        site._modules.pop(child, None)
    del site.output_scale, site.enabled


def no_training(name: str) -> str:
    """Return the message for a frozen site that is asked to train."""
    return (
        f"{name or '(root)'}: a frozen layer holds integer codes and cannot be trained. Call .eval() on the model; "
        "to train on, go back to the quantized model (or its checkpoint) and freeze it again."
    )
