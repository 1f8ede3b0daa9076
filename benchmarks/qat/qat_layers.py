"""Two contenders of `qat_step.py` written as in their papers: plain LSQ, and DAQ's literal equations.

Neither is optimized: this is the code that a reader of the paper would write. Both are layers that compute
`conv(quantized x, quantized w)` and leave the rest to autograd.

References: "Learned Step Size Quantization" (Esser et al., ICLR 2020), section 2; "Distance-aware Quantization" (Kim,
Lee, Ham, ICCV 2021), equations 1-11.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.qat.qat_networks import BITS
from daqconvert.functional.reference import dasr_reference

N = 2**BITS - 1


def operation(layer: nn.Module, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """Return the convolution or product of a layer with other operands."""
    if isinstance(layer, nn.Conv2d):
        return F.conv2d(x, w, bias, layer.stride, layer.padding, layer.dilation, layer.groups)
    return F.linear(x, w, bias)


def lsq(v: Tensor, s: Tensor, lowest: int, highest: int) -> Tensor:
    """Return `clip(v / s)` rounded, times `s`; the gradient to `s` is scaled by `1 / sqrt(N * highest)`."""
    g = 1.0 / (v.numel() * highest) ** 0.5
    s = (s - s * g).detach() + s * g
    x = torch.clamp(v / s, lowest, highest)
    x = (x.round() - x).detach() + x
    return x * s


class Lsq(nn.Module):
    """A convolution or linear whose input and weight pass through `lsq`, one step size each.

    Args:
        layer: The float layer; its weight and bias are taken over.
        signed: Whether the input has negative values.
        x: A batch of its input, for the start of the step size.
    """

    def __init__(self, layer: nn.Module, signed: bool, x: Tensor) -> None:
        super().__init__()
        self.layer = [layer]  # not a child: its stride, padding, ... are needed, its parameters are taken over
        self.weight, self.bias = layer.weight, layer.bias
        self.x_range = (-(2 ** (BITS - 1)), 2 ** (BITS - 1) - 1) if signed else (0, N)
        self.w_range = (-(2 ** (BITS - 1)), 2 ** (BITS - 1) - 1)
        self.x_step = nn.Parameter(2 * x.abs().mean() / self.x_range[1] ** 0.5)
        self.w_step = nn.Parameter(2 * self.weight.detach().abs().mean() / self.w_range[1] ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output from quantized operands."""
        x, w = lsq(x, self.x_step, *self.x_range), lsq(self.weight, self.w_step, *self.w_range)
        return operation(self.layer[0], x, w, self.bias)


class Reference(nn.Module):
    """The layer of the DAQ paper with the literal soft rounding: `|output_scale| * conv(q / n, (2 q_w - n) / n)`.

    Weights are normalized by their mean and standard deviation, bounds start at -3 and 3; inputs are clipped to
    `[0, upper]`. A signed input, which the paper does not have, gets a learned `lower` and an integer zero point.

    Args:
        layer: The float layer; its weight and bias are taken over.
        signed: Whether the input has negative values.
        x: A batch of its input, for the start of `upper` and of `output_scale`.
    """

    def __init__(self, layer: nn.Module, signed: bool, x: Tensor) -> None:
        super().__init__()
        self.layer = [layer]
        self.weight, self.bias = layer.weight, layer.bias
        self.w_lower, self.w_upper = nn.Parameter(torch.tensor(-3.0)), nn.Parameter(torch.tensor(3.0))
        self.x_upper = nn.Parameter(3.0 * x.std())
        self.x_lower = nn.Parameter(torch.maximum(x.min(), -3.0 * x.std())) if signed else None
        with torch.no_grad():
            full = operation(layer, x, self.weight, None).abs().mean()
            quantized = operation(layer, self.quantized_input(x), self.quantized_weight(), None).abs().mean()
        self.output_scale = nn.Parameter(full / quantized)

    def quantized_input(self, x: Tensor) -> Tensor:
        """Return `(q - zero_point) / n`."""
        if self.x_lower is None:
            return dasr_reference(x / (self.x_upper / N), N, 2.0, 2.0) / N
        scale = (self.x_upper - self.x_lower) / N
        zero = torch.round(-self.x_lower / scale).clamp(0, N).detach()
        return (dasr_reference(x / scale + zero, N, 2.0, 2.0) - zero) / N

    def quantized_weight(self) -> Tensor:
        """Return `(2 q_w - n) / n`."""
        v = (self.weight - self.weight.mean().detach()) / self.weight.std().detach()
        q = dasr_reference((v - self.w_lower) / ((self.w_upper - self.w_lower) / N), N, 2.0, 1.0)
        return (2.0 * q - N) / N

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output from quantized operands; the bias stays float and is added last."""
        y = operation(self.layer[0], self.quantized_input(x), self.quantized_weight(), None) * self.output_scale.abs()
        if self.bias is None:
            return y
        return y + (self.bias[:, None, None] if self.weight.dim() == 4 else self.bias)


def replaced(model: nn.Module, layers: dict[str, Any]) -> nn.Module:
    """Replace layers of a model by others, by name, in place."""
    for name, layer in layers.items():
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, layer)
    return model
