"""Where `output_scale` starts: what a layer computes in float over what it computes from codes.

Where the grid carries real units it is 1. Elsewhere, as in the paper, `mean|conv(x, W)| / mean|conv(x_q, W_q)|` on one
batch, both without bias, per channel where the scale is. A channel that computes nothing but zeros there (its input is
dead on this batch, or the batch does not reach the layer) has no such ratio; it starts at an estimate from its weight
alone, for at 0 the gradient of `|output_scale|` is 0 too and the channel would be lost for good.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from daqconvert.errors import CalibrationError
from daqconvert.functional.grid import levels
from daqconvert.layers.site import Operation, QuantizedSite, Watcher, safe_products
from daqconvert.quantizers import WeightQuantizer


class OutputScaleStart(Watcher):
    """Sets the output scale of one site, as its watcher, from every call of one batch.

    Args:
        site: A quantized site with calibrated quantizers, whose grid carries no units (`site.unitless`).
    """

    def __init__(self, site: QuantizedSite) -> None:
        with torch.no_grad():
            site.output_scale.copy_(_estimate(site))
        self.exact: Tensor | float = 0.0
        self.quantized: Tensor | float = 0.0

    @torch.no_grad()
    def before(self, site: Any, x: Tensor, weight: Tensor | None, operation: Operation) -> Tensor:
        """Add one call to the sums and set the scale from them, just before the site computes.

        Args:
            site: The site.
            x: Its input.
            weight: Its weight.
            operation: Its bare products.

        Raises:
            CalibrationError: If the site's float output holds NaN or infinite values.
        """
        assert weight is not None
        start = site.output_scale.clone()
        site.output_scale.fill_(1.0)
        w, top = site.weight_quantizer(weight), site.combined_scale()
        operand = x if site.input_quantizer is None else site.input_quantizer(x)
        acc, scale = safe_products(operation, operand, w, top, site.settings)
        # NOTE: in float32, for the plain sums of a float16 layer may pass 65504
        exact = operation(_wide(x), _wide(weight))
        self.exact = self.exact + _channel_mean(exact, site)
        self.quantized = self.quantized + _channel_mean(acc, site) * scale
        ratio = self.exact / self.quantized
        if not bool((torch.isfinite(ratio) | (self.quantized == 0)).all()):
            raise CalibrationError(
                f"{site.layer_name or '(root)'}: its output holds NaN or infinite values in the float model. "
                "Look for them in the calibration data or in the layers before it."
            )
        usable = (self.quantized > 0) & (ratio > 0)
        site.output_scale.copy_(torch.where(usable, ratio, start.to(ratio.dtype)))
        return x


def _estimate(layer: QuantizedSite) -> Tensor:
    """`mean|W| / mean|W_q|`, per channel where the scale is, times what the full range of the input is worth."""
    quantizer, weight = layer.weight_quantizer, layer.float_weight()
    assert isinstance(quantizer, WeightQuantizer) and weight is not None  # only such a grid carries no units
    weight, operand = _wide(weight), _wide(quantizer(weight)) / levels(quantizer.bits, quantizer.grid)
    layout, dim = quantizer.layout, layer.output_scale.dim()
    mean, mean_q = (layout.rows(t).abs().mean(dim=1) if dim else t.abs().mean() for t in (weight, operand))
    ratio = mean / mean_q.clamp(min=1e-12)
    if layer.input_quantizer is None:
        return ratio
    return ratio * layer.input_quantizer.scale() * (2**layer.input_quantizer.bits - 1)


def _channel_mean(y: Tensor, layer: QuantizedSite) -> Tensor:
    """Mean absolute value, per output channel where the layer has a scale per channel."""
    wide = _wide(y.detach()).abs()
    if layer.output_scale.dim() == 0:
        return wide.mean()
    channel = wide.movedim(-1 - layer.output_dims, 0)
    return channel.reshape(channel.shape[0], -1).mean(dim=1)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
