"""Quantized weights and inputs written as the formulas of `docs/method.md`, with gradients from autograd."""

import torch

from daqconvert.functional import slope

CLOSE = {"rtol": 1e-11, "atol": 1e-12}
"""How nearly the package computes in float64 what a formula says."""
SETTINGS = {
    "integer": {"w_bits": 4, "grid": "integer", "normalize": False},
    "midrise": {"w_bits": 3, "grid": "midrise", "normalize": False},
    "normalized": {"w_bits": 2, "normalize": True},
    "binary": {"w_bits": 1, "normalize": False},
}


def rounded(x, low, high, coefficients):
    """`round(clip(x))` whose gradient is the slope inside the clip and 0 outside; no value here lies on an end."""
    if callable(coefficients):  # another rounding
        return coefficients(x, low, high)
    inside = ((x >= low) & (x <= high)).detach()
    factor = torch.ones_like(x) if coefficients is None else slope(x.detach(), *coefficients)
    value = torch.round(x.detach().clamp(low, high))
    return value + torch.where(inside, factor, 0.0) * (x - x.detach())


def shaped(bound, layer):
    """Return a bound in the shape that broadcasts against the layer's weight."""
    return bound.reshape(()) if bound.numel() == 1 else bound.reshape(layer.weight_quantizer.layout.bound_view)


def literal_weight(layer, parameters, coefficients):
    """Return the quantized weight; its mean and std are constant for the gradient, as in the paper."""
    bits, layout = layer.settings.w_bits, layer.weight_quantizer.layout
    weight, upper = parameters["weight"].reshape(layout.view), shaped(parameters["weight_quantizer.upper"], layer)
    if layer.settings.grid == "integer":
        m = 2 ** (bits - 1) - 1
        return (rounded(weight * m / upper, -m, m, coefficients) * upper / m).reshape(layer.weight.shape)
    n = 2**bits - 1
    if not layer.settings.normalize:
        x = (weight + upper) / (2 * upper / n)
        return ((2 * rounded(x, 0, n, coefficients) - n) / n * upper).reshape(layer.weight.shape)
    dims = [d for d, size in enumerate(layout.bound_view) if size == 1] if upper.dim() else None
    mean, std = weight.detach().mean(dims, keepdim=True), weight.detach().std(dims, keepdim=True)
    lower = shaped(parameters["weight_quantizer.lower"], layer)
    x = ((weight - mean) / std - lower) / ((upper - lower) / n)
    return ((2 * rounded(x, 0, n, coefficients) - n) / n).reshape(layer.weight.shape)


def literal_input(layer, x, parameters, coefficients):
    """Return the quantized input; the zero point is constant for the gradient."""
    n = 2**layer.settings.a_bits - 1
    lower, upper = parameters["input_quantizer.lower"], parameters["input_quantizer.upper"]
    scale = (upper - lower) / n
    zero_point = torch.round(-lower / scale).clamp(0, n).detach()
    operand = rounded(x / scale, -zero_point, n - zero_point, coefficients)
    return operand / n if layer.settings.normalize else operand * scale
