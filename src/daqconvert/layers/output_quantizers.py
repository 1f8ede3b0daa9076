"""Output quantizers, which `deploy="integer"` adds: each rounds what one module returns.

    y = clip(round(x / scale), -zero_point, n - zero_point) * scale

An output quantizer is a child of the module, called by a forward hook; the module keeps its class and its forward.
A site that reads the rounded value quantizes it again by its own input quantizer, and finds the same codes if its grid
is the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from daqconvert.errors import ConversionError
from daqconvert.layers.frozen_site import FrozenSite, drop_quantizers, empty_values
from daqconvert.layers.site import QuantizedSite
from daqconvert.spec import OUTPUT_QUANTIZER, PlanRow, Settings

FROZEN_BUFFERS = ("input_scale", "input_zero_point")


def _itself(x: Tensor, weight: Tensor) -> Tensor:
    """Return the input: the operation of a site that has no weight."""
    return x


class OutputQuantizer(QuantizedSite):
    """Quantizes the output of the module that it is a child of: a site with an input quantizer and no weight."""

    output_dims = 0

    def make(self, settings: Settings, name: str, signed: bool | None, like: Tensor) -> None:
        """Add the quantizer; `like` is any tensor of the model's dtype and device."""
        self.attach(settings, name, signed, like, None)
        one = self.output_scale.detach()
        del self.output_scale
        # NOTE: a buffer, not a parameter, because a learned factor would move the output off the quantizer's grid
        self.register_buffer("output_scale", one, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` on the grid, in its shape and dtype."""
        return self.run(x, None, None, _itself, lambda x: x)  # type: ignore[arg-type] # no weight is asked for

    def extra_repr(self) -> str:
        """Return the bits."""
        return f"a_bits={self.settings.a_bits}"


class FrozenOutputQuantizer(FrozenSite):
    """The frozen form of `OutputQuantizer`."""

    output_dims = 0

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` on the grid, in its shape and dtype."""
        for watcher in self.watchers:
            x = watcher.before(self, x, None, _itself)
        if self.qdq:
            on_grid: Tensor = torch.ops.daqconvert.round_to_grid(
                x, self.input_scale, self.input_zero_point, self.settings.a_bits, self.layer_name
            )
        else:
            on_grid = (self.input_operand(x) * self.input_scale).to(x.dtype)
        for watcher in self.watchers:
            watcher.after(self, on_grid)
        return on_grid

    def extra_repr(self) -> str:
        """Return the bits."""
        return f"a_bits={self.settings.a_bits}, frozen"


def add_output_quantizer(model: nn.Module, row: PlanRow, frozen: bool) -> None:
    """Give the module that a plan's row names an output quantizer, in place.

    With `frozen` it is a frozen one, whose values are placeholders to be loaded.

    Raises:
        ConversionError: If there is no such module, or it has a child of that name.
    """
    output, settings = row.site.output, row.settings
    place = None if output is None else output.place
    modules = dict(model.named_modules(remove_duplicate=False))
    module = None if place is None else modules.get(place)
    if module is None or settings is None or hasattr(module, OUTPUT_QUANTIZER):
        found = "no such module" if module is None else f"one that has a {OUTPUT_QUANTIZER} already"
        raise ConversionError(f"{row.name}: expected a module to quantize the output of, found {found}.")
    like = _like(module, model)
    quantizer: OutputQuantizer | FrozenOutputQuantizer
    if frozen:
        quantizer = FrozenOutputQuantizer()
        quantizer.training = False
        values = empty_values(settings, like, None)
        quantizer.hold(settings, row.name, like.dtype, {key: values[key] for key in FROZEN_BUFFERS})
    else:
        quantizer = OutputQuantizer()
        quantizer.training = module.training
        quantizer.make(settings, row.name, row.signed, torch.empty(0, dtype=like.dtype, device=like.device))
    module.add_module(OUTPUT_QUANTIZER, quantizer)
    module.register_forward_hook(quantize_output, prepend=True)


def _like(module: nn.Module, model: nn.Module) -> Tensor:
    """Return a tensor of the dtype and device that a module computes in: a parameter, or what a frozen site says."""
    for part in (module, model):
        for parameter in part.parameters():
            if parameter.is_floating_point():
                return parameter
        for site in part.modules():
            if isinstance(site, FrozenSite):
                return torch.empty(0, dtype=site.dtype, device=next(site.buffers()).device)
    return torch.empty(0)


def quantize_output(module: nn.Module, args: Any, output: Any) -> Any:
    """Return a module's output on the grid of its output quantizer; this is the module's forward hook.

    Raises:
        ConversionError: If the output is not a tensor.
    """
    quantizer: Any = module._modules[OUTPUT_QUANTIZER]
    if not isinstance(output, Tensor):
        raise ConversionError(
            f"{quantizer.layer_name}: expected a tensor from {type(module).__name__}, found {type(output).__name__}. "
            'Leave its outputs in float: a rule for the layers before it with deploy = "float".'
        )
    return quantizer(output)


def freeze_output_quantizer(quantizer: Any, values: dict[str, Tensor]) -> None:
    """Turn an `OutputQuantizer` into its frozen form, in place, with the buffers that `frozen_values` returned."""
    settings, name, dtype = quantizer.settings, quantizer.layer_name, quantizer.output_scale.dtype
    drop_quantizers(quantizer)
    quantizer.__class__ = FrozenOutputQuantizer
    quantizer.training = False
    quantizer.hold(settings, name, dtype, {key: values[key] for key in FROZEN_BUFFERS})
