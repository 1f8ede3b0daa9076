"""The state that every quantized site shares, whichever forward its products are computed in.

    y = operation(q_x - zero_point, operand_w) * S + bias,   S = |output_scale| * weight scale * input scale

The operands are integer-valued, all scales come after the sum, the bias stays float and is added last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from daqconvert.functional.codes import InputCodes, codes_of, pad_operand
from daqconvert.functional.grid import levels
from daqconvert.functional.layer_compiled import compiled_layer
from daqconvert.functional.layer_operator import quantized_layer
from daqconvert.functional.product_operator import can_compile, can_fuse, scaled_products
from daqconvert.functional.products import KNOWN, KnownProducts, PaddedProducts
from daqconvert.quantizers import ChannelLayout, InputQuantizer, WeightQuantizer
from daqconvert.quantizers.making import make_input_quantizer, make_weight_quantizer
from daqconvert.spec import Settings

Operation = Callable[[Tensor, Tensor], Tensor]
"""The bare products of `x` and `w`: no bias, no scale."""


class Watcher:
    """Sees every computation of a site: what `watching` attaches. Both methods do nothing here."""

    def before(self, site: Any, x: Tensor, weight: Tensor | None, operation: Operation) -> Tensor:
        """Return the input to compute with; called just before the site computes, quantizers on or off.

        Args:
            site: A `QuantizedSite` or `FrozenSite`.
            x: Its float input.
            weight: Its float weight; None where a frozen site holds codes instead.
            operation: Its bare products.
        """
        return x

    def after(self, site: Any, y: Tensor) -> None:
        """See the output."""


@contextmanager
def watching(site: Any, watcher: Watcher) -> Iterator[None]:
    """Attach a watcher to a site while the context lasts."""
    before = site.watchers
    site.watchers = (*before, watcher)
    try:
        yield
    finally:
        site.watchers = before


class QuantizedSite(nn.Module):
    """Mixin of everything that holds the quantizers of a site.

    Attributes:
        weight_quantizer: Or None where the weight stays float; an `InputQuantizer` where it depends on the data.
        input_quantizer: Or None where the input stays float.
        output_scale: Parameter of shape `()` or `(C_out,)`.
        settings: What the plan's row said.
        enabled: False computes what the original computes with the current weights.
        watchers: What `watching` has attached.

    Reference: METHOD of the paper, "Distance-aware Quantization" (Kim, Lee, Ham, ICCV 2021), section 3.3.
    """

    weight_quantizer: WeightQuantizer | InputQuantizer | None
    input_quantizer: InputQuantizer | None
    output_scale: nn.Parameter
    output_dims: int
    settings: Settings
    layer_name: str
    enabled: bool
    watchers: tuple[Watcher, ...]

    def attach(
        self, settings: Settings, name: str, signed: bool | None, weight: Tensor, layout: ChannelLayout | None
    ) -> None:
        """Add quantizers and output scale, the weight's bounds set from the weight.

        Args:
            settings: With nothing left on `"auto"`.
            name: Dotted name of the site, for messages.
            signed: Sign of its input, None for undecided.
            weight: The weight; where it depends on the data any tensor of the model's dtype and device.
            layout: Where its output channels are; None for a weight that depends on the data.

        Raises:
            ConversionError: If the weight is empty, not finite, or constant where it must be normalized.
        """
        self.settings, self.layer_name, self.enabled, self.watchers = settings, name, True, ()
        self.weight_quantizer = self.input_quantizer = None
        if settings.w_bits is not None and layout is not None:
            self.weight_quantizer = make_weight_quantizer(settings, layout, name, weight)
        elif settings.w_bits is not None:
            self.weight_quantizer = make_input_quantizer(settings, None, name, weight, role="weight")
        if settings.a_bits is not None:
            self.input_quantizer = make_input_quantizer(settings, signed, name, weight)
        shape = (layout.channels,) if layout is not None and settings.granularity == "channel" else ()
        one = torch.ones(shape, dtype=weight.dtype, device=weight.device)
        self.output_scale = nn.Parameter(one, requires_grad=settings.rounding != "lsq")  # it has steps alone
        if isinstance(self.weight_quantizer, WeightQuantizer) and not weight.is_meta:
            self.weight_quantizer.initialize(weight)
        self.train(self.training)

    def leave_meta(self) -> None:
        """Give bounds, flags and scale a place where the model's weights are by now; they wait for `calibrate`."""
        weight = self.float_weight()
        places = [t.device for t in (*self.parameters(), *self.buffers()) if not t.is_meta]
        device = weight.device if weight is not None else places[0] if places else torch.device("cpu")
        for owner in (self, self.weight_quantizer, self.input_quantizer):
            parameters: dict[str, Any] = {} if owner is None else owner._parameters
            for name, tensor in list(parameters.items()):
                if tensor is not None and tensor.is_meta and (owner is not self or name == "output_scale"):
                    found = torch.ones_like(tensor, device=device)
                    parameters[name] = nn.Parameter(found, requires_grad=tensor.requires_grad)
            buffers: dict[str, Any] = {} if owner is None or owner is self else owner._buffers
            for name, tensor in list(buffers.items()):
                if tensor is not None and tensor.is_meta:
                    buffers[name] = torch.zeros_like(tensor, device=device)

    def float_weight(self) -> Tensor | None:
        """Return the weight as the original computes it from its parameters; None where it depends on the data."""
        return None

    @property
    def unitless(self) -> bool:
        """Whether operands count in parts of full range, as the paper's do, and `output_scale` carries the units."""
        return isinstance(self.weight_quantizer, WeightQuantizer) and self.weight_quantizer.normalize

    def run(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, operation: Operation, plain: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Return the site's output from integer-valued operands; the original's where `enabled` is False.

        Args:
            x: Float input.
            weight: Float weight.
            bias: Or None.
            operation: The bare products.
            plain: What the original computes from an input.
        """
        for watcher in self.watchers:
            x = watcher.before(self, x, weight, operation)
        y = self._quantized(x, weight, bias, operation) if self.enabled else plain(x)
        for watcher in self.watchers:
            watcher.after(self, y)
        return y

    def _quantized(self, x: Tensor, weight: Tensor, bias: Tensor | None, operation: Operation) -> Tensor:
        of_input, of_weight = self.input_quantizer, self.weight_quantizer
        if (
            isinstance(operation, KNOWN)
            and isinstance(of_weight, WeightQuantizer)
            and of_input is not None
            and of_input.is_plain()
            and of_weight.is_plain()
        ):
            if can_fuse(operation, x, weight, self.output_scale, bias):
                grids = of_input.grid(x), of_weight.quantized(weight)
                return quantized_layer(operation, x, weight, bias, self.output_scale, *grids)
            if can_compile(operation, x, weight, self.output_scale):
                return self._compiled(x, weight, bias, operation, of_input, of_weight)
        operand = x if of_input is None else of_input(x)
        w = weight if of_weight is None else of_weight(weight)
        scale = self.sum_scale(operand)
        if isinstance(operation, PaddedProducts):
            operand, operation = pad_operand(operation.pad, operand), operation.products
        if can_fuse(operation, operand, w, scale, bias):
            assert isinstance(operation, KNOWN)
            return scaled_products(operation, operand, w, scale, bias)
        acc, scale = safe_products(operation, operand, w, scale, self.settings)
        return rescale(acc, scale, bias, self.output_dims, acc.dtype)

    def _compiled(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, operation: KnownProducts, of_input: InputQuantizer,
        of_weight: WeightQuantizer,
    ) -> Tensor:  # fmt: skip
        """The same for `torch.compile`: see `functional.compiled`."""
        grid = of_input.grid(x)
        mean, std = of_weight.moments(weight)
        return compiled_layer(
            operation, x, weight, bias, self.output_scale, grid.lower, grid.upper, of_weight.own_lower,
            of_weight.upper, mean, std, of_weight.view, grid.bits, of_weight.bits, of_weight.grid,
            (grid.rounding.kind, of_weight.rounding.kind), of_input.slope, of_weight.slope,
        )  # fmt: skip

    def sum_scale(self, operand: Tensor | None = None) -> Tensor:
        """Return `S = |output_scale| * weight scale * input scale`, shape of `output_scale`, float32.

        Args:
            operand: What the input quantizer has just returned: its scale is known then.
        """
        scale = self.output_scale.abs()
        scale = scale if scale.dtype == torch.float64 else scale.float()
        if self.weight_quantizer is not None:
            scale = scale * self.weight_quantizer.scale()
        if self.input_quantizer is not None:
            n = 2**self.input_quantizer.bits - 1
            coded = None if operand is None else codes_of(operand)
            of_input = coded.scale if isinstance(coded, InputCodes) else self.input_quantizer.scale()
            scale = scale * (1.0 / n if self.unitless else of_input)
        return scale


def safe_products(
    operation: Operation, x: Tensor, w: Tensor, scale: Tensor, settings: Settings
) -> tuple[Tensor, Tensor]:
    """Return `operation(x, w)` and the scale that belongs to it.

    float16 overflows at 65504, so there operands are divided into fractions first, and the scale multiplied.

    Args:
        operation: The bare products.
        x: Operand of the input.
        w: Operand of the weight.
        scale: What one unit of their products is worth.
        settings: Of the site.
    """
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
    return operation(x, w), scale


def rescale(acc: Tensor, scale: Tensor, bias: Tensor | None, output_dims: int, dtype: torch.dtype) -> Tensor:
    """Return `acc * scale + bias` in float32 (float64 for float64), as `dtype`.

    Args:
        acc: Sums of products, channel at dimension `-1 - output_dims`.
        scale: `()` or `(C_out,)`.
        bias: `(C_out,)`, or anything that broadcasts where the channel is last, or None.
        output_dims: Number of dimensions after the channel.
        dtype: Of the result.
    """
    wide = acc if acc.dtype == torch.float64 else acc.float()
    out = wide * (scale.reshape(-1, *(1,) * output_dims) if scale.dim() and output_dims else scale)
    if bias is not None:
        bias = bias if bias.dtype == out.dtype else bias.to(out.dtype)
        out = out + (bias.reshape(-1, *(1,) * output_dims) if output_dims else bias)
    return out.to(dtype)
