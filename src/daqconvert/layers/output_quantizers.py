"""Quantizers of outputs, which `deploy="integer"` adds: a child and a forward hook of the module that returns a value.

    y = (clip(round(x / scale), -zero_point, n - zero_point)) * scale

The module keeps its class and its forward; its value lies on a grid. What reads it is quantized again by its own input
quantizer: to the same codes, where that has the same grid.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from daqconvert.errors import ConversionError
from daqconvert.layers.frozen_site import FrozenSite, empty_values
from daqconvert.layers.site import QuantizedSite
from daqconvert.spec import OUTPUT_QUANTIZER, PlanRow


def _itself(x: Tensor, weight: Tensor) -> Tensor:
    """The operation of a site that multiplies by nothing."""
    return x


class OutputQuantizer(QuantizedSite):
    """Quantizes the output of the module that it is a child of; its scale is the quantizer's own."""

    output_dims = 0

    def take(self, row: PlanRow, like: Tensor) -> None:
        """Make the quantizer.

        Args:
            row: Of the plan.
            like: Any tensor of the model's dtype and device.
        """
        assert row.settings is not None
        self.attach(row.settings, row.name, row.signed, like, None)
        one = self.output_scale.detach()
        del self.output_scale
        self.register_buffer("output_scale", one, persistent=False)  # what leaves has to lie on the quantizer's grid

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


def quantize_output(module: nn.Module, args: Any, output: Any) -> Any:
    """Return a module's output on its grid; the forward hook of a module that has a quantizer of its output.

    Args:
        module: With a child `output_quantizer`.
        args: Of its forward.
        output: Of its forward.

    Raises:
        ConversionError: If it is no tensor.
    """
    site: Any = module._modules[OUTPUT_QUANTIZER]
    if not isinstance(output, Tensor):
        raise ConversionError(
            f"{site.layer_name}: expected a tensor from {type(module).__name__}, found {type(output).__name__}. "
            'Leave its outputs in float: a rule for the layers before it with deploy = "float".'
        )
    return site(output)


def add_output_quantizer(model: nn.Module, row: PlanRow, frozen: bool) -> None:
    """Give a module of a model the quantizer of its output, in place.

    Args:
        model: The whole model.
        row: Of the plan, with the module's name in `site.output.place`.
        frozen: Make an empty frozen quantizer, whose values are to be loaded.

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
    like = next((p for p in (*module.parameters(), *model.parameters()) if p.is_floating_point()), torch.empty(0))
    site: OutputQuantizer | FrozenOutputQuantizer
    if frozen:
        site = FrozenOutputQuantizer()
        site.training = False
        values = empty_values(settings, like, None)
        site.hold(settings, row.name, like.dtype, {key: values[key] for key in ("input_scale", "input_zero_point")})
    else:
        site = OutputQuantizer()
        site.training = module.training
        site.take(row, torch.empty(0, dtype=like.dtype, device=like.device))
    module.add_module(OUTPUT_QUANTIZER, site)
    module.register_forward_hook(quantize_output, prepend=True)


def freeze_output_quantizer(site: Any, values: dict[str, Tensor]) -> None:
    """Turn the quantizer of an output into its frozen form, in place.

    Args:
        site: An `OutputQuantizer`.
        values: From `frozen_values`.
    """
    settings, name, dtype = site.settings, site.layer_name, site.output_scale.dtype
    for child in ("weight_quantizer", "input_quantizer"):
        site.__dict__.pop(child, None)
        site._modules.pop(child, None)
    del site.output_scale, site.enabled
    site.__class__ = FrozenOutputQuantizer
    site.training = False
    site.hold(settings, name, dtype, {key: values[key] for key in ("input_scale", "input_zero_point")})
