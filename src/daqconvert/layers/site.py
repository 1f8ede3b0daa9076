"""The state that every quantized site has, and the computation of its output from integer-valued operands.

    y = operation(operand_x, operand_w) * sum_scale + bias
    sum_scale = |output_scale| * weight scale * input scale

Operands are integer-valued (`operand_x = code - zero_point`). All scales are applied after the sum; the bias stays
float and is added last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from daqconvert.functional.codes import InputCodes, codes_of, pad_operand
from daqconvert.functional.grid import levels, sum_scale
from daqconvert.functional.layer_compiled import compiled_layer
from daqconvert.functional.layer_operator import quantized_layer
from daqconvert.functional.product_operator import can_compile, can_fuse, scaled_products
from daqconvert.functional.products import KNOWN, KnownProducts, PaddedProducts, rescale
from daqconvert.quantizers import ChannelLayout, InputQuantizer, WeightQuantizer
from daqconvert.quantizers.base import widen_scalars
from daqconvert.quantizers.making import make_input_quantizer, make_weight_quantizer
from daqconvert.spec import Settings

Operation = Callable[[Tensor, Tensor], Tensor]
"""The bare products of `x` and `w`: no bias, no scale."""


class Watcher:
    """Is told of every computation of a site that `watching` attached it to. The methods of this base do nothing."""

    def before(self, site: Any, x: Tensor, weight: Tensor | None, operation: Operation) -> Tensor:
        """Return the input to compute with. Called just before a site computes, whether or not it quantizes.

        Args:
            site: A `QuantizedSite` or `FrozenSite`.
            x: Float input of the site.
            weight: Float weight of the site; None if a frozen site has codes instead.
            operation: Bare products of the site.
        """
        return x

    def after(self, site: Any, y: Tensor) -> None:
        """See the output of the site."""


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
    """Mixin of every module that holds the quantizers of a site.

    Attributes:
        weight_quantizer: None if the weight stays float; an `InputQuantizer` if the weight depends on the data.
        input_quantizer: None if the input stays float.
        output_scale: Learned factor of the output, a parameter of shape `(1,)` or `(C_out,)`; with LSQ a
            buffer of ones.
        scales_channels: Whether `output_scale` has a factor for each output channel.
        settings: Settings of the site's row in the plan.
        layer_name: Dotted name of the site, for messages.
        enabled: If False, the site computes what the original computes with the current weights.
        watchers: The watchers that `watching` has attached.

    Reference: METHOD of the paper, "Distance-aware Quantization" (Kim, Lee, Ham, ICCV 2021), section 3.3.
    """

    weight_quantizer: WeightQuantizer | InputQuantizer | None
    input_quantizer: InputQuantizer | None
    output_scale: Tensor
    scales_channels: bool = True  # also of a model that an earlier version pickled, whose scales are as they were
    output_dims: int
    settings: Settings
    layer_name: str
    enabled: bool
    watchers: tuple[Watcher, ...]

    def attach(
        self, settings: Settings, name: str, signed: bool | None, weight: Tensor, layout: ChannelLayout | None
    ) -> None:
        """Add the quantizers and the output scale, and set the weight's bounds from the weight.

        Args:
            settings: Settings with nothing left on `"auto"`.
            name: Dotted name of the site, for messages.
            signed: Whether the input is signed; None if `calibrate` decides.
            weight: The weight; if it depends on the data, any tensor of the model's dtype and device.
            layout: Which dimension of the weight holds the output channels; None if the weight depends on the data.

        Raises:
            ConversionError: If the weight is empty, not finite, or constant although it must be normalized.
        """
        self.settings, self.layer_name, self.enabled, self.watchers = settings, name, True, ()
        self.weight_quantizer = self.input_quantizer = None
        if settings.w_bits is not None and layout is not None:
            self.weight_quantizer = make_weight_quantizer(settings, layout, name, weight)
        elif settings.w_bits is not None:
            self.weight_quantizer = make_input_quantizer(settings, None, name, weight, role="weight")
        if settings.a_bits is not None:
            self.input_quantizer = make_input_quantizer(settings, signed, name, weight)
            # the output scale of a unitless site starts in `calibrate` as well, and no flag goes with it
            by_bounds = settings.rounding != "lsq" and not settings.symmetric  # whether they tell the sign
            self.input_quantizer.recovers = not self.unitless and (signed is not None or by_bounds)
        self.scales_channels = layout is not None and settings.granularity == "channel"
        channels = layout.channels if layout is not None and self.scales_channels else 1
        one = torch.ones(channels, dtype=weight.dtype, device=weight.device)
        if settings.rounding == "lsq":  # learns step sizes only, also if a whole model is unfrozen
            self.register_buffer("output_scale", one)
        else:
            self.output_scale = nn.Parameter(one)
        if isinstance(self.weight_quantizer, WeightQuantizer) and not weight.is_meta:
            self.weight_quantizer.initialize(weight)
        self.train(self.training)

    def leave_meta(self) -> None:
        """Move bounds, flags and output scale from the meta device to the device of the weights.

        Parameters and output scales become ones, other buffers zeros; `calibrate` sets their values later.
        """
        weight = self.float_weight()
        places = [t.device for t in (*self.parameters(), *self.buffers()) if not t.is_meta]
        device = weight.device if weight is not None else places[0] if places else torch.device("cpu")
        for owner in (self, self.weight_quantizer, self.input_quantizer):
            parameters: dict[str, Any] = {} if owner is None else owner._parameters
            for name, tensor in list(parameters.items()):
                if tensor is not None and tensor.is_meta and (owner is not self or name == "output_scale"):
                    found = torch.ones_like(tensor, device=device)
                    parameters[name] = nn.Parameter(found, requires_grad=tensor.requires_grad)
            buffers: dict[str, Any] = {} if owner is None else owner._buffers
            for name, tensor in list(buffers.items()):
                if tensor is not None and tensor.is_meta and (owner is not self or name == "output_scale"):
                    make = torch.ones_like if owner is self else torch.zeros_like
                    buffers[name] = make(tensor, device=device)

    def float_weight(self) -> Tensor | None:
        """Return the weight as the original computes it from its parameters; None if it depends on the data."""
        return None

    @property
    def unitless(self) -> bool:
        """Whether operands are fractions of the full range, as in the paper, and `output_scale` carries the units."""
        return isinstance(self.weight_quantizer, WeightQuantizer) and self.weight_quantizer.normalize

    def run(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, operation: Operation, plain: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Return the output computed from integer-valued operands; that of the original if `enabled` is False.

        Args:
            x: Float input.
            weight: Float weight.
            bias: Float bias `(C_out,)`, or None for no bias.
            operation: The bare products.
            plain: Computes what the original computes, bias included, from an input.
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
        return rescale(acc, scale, bias, self.output_dims)

    def _compiled(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, operation: KnownProducts, of_input: InputQuantizer,
        of_weight: WeightQuantizer,
    ) -> Tensor:  # fmt: skip
        """Return the output as operations that `torch.compile` can fuse; see `functional.layer_compiled`."""
        grids, slopes = (of_input.grid(x), of_weight.weight_grid(weight)), (of_input.slope, of_weight.slope)
        return compiled_layer(operation, x, weight, bias, self.output_scale, *grids, slopes)

    def sum_scale(self, operand: Tensor | None = None) -> Tensor:
        """Return the real units per integer sum, shape `()` or `(C_out,)`, in float32 or wider.

        If `operand`, the last result of the input quantizer, is given, the input's scale is taken from it.
        """
        of_weight = None if self.weight_quantizer is None else self.weight_quantizer.scale()
        of_input: Tensor | float | None = None
        if self.input_quantizer is not None:
            codes = None if operand is None else codes_of(operand)
            scale = codes.scale if isinstance(codes, InputCodes) else self.input_quantizer.scale()
            of_input = 1.0 / (2**self.input_quantizer.bits - 1) if self.unitless else scale
        factor = self.output_scale if self.scales_channels else self.output_scale.reshape(())
        return sum_scale(factor, of_weight, of_input)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        widen_scalars(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)


def safe_products(
    operation: Operation, x: Tensor, w: Tensor, scale: Tensor, settings: Settings
) -> tuple[Tensor, Tensor]:
    """Return `operation(x, w)` of two operands and the sum scale that belongs to it.

    float16 overflows at 65504. Operands in float16 are therefore divided by their full range before they are
    multiplied, and the scale is multiplied by the same number.
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


def bits_text(settings: Settings) -> str:
    """Return the bits of a site as `print(model)` shows them."""
    return f"w_bits={settings.w_bits or 'float'}, a_bits={settings.a_bits or 'float'}"
