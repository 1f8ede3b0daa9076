"""Rounding with a gradient: distance-aware soft rounding (DASR) in closed form, its published alternatives, ties.

Convention: `x` is in level units, so that levels are the integers and a quantizer of `b` bits has the codes
`0 .. n`, `n = 2**b - 1`. Ties round half to even everywhere in this project (`round_half_even`), because ONNX
`QuantizeLinear` does; the authors' code sends them down. Arithmetic is float32 (float64 for float64 inputs); the
result has the dtype of the input.

All roundings have the forward `q = round(x)`. With `t = x - floor(x)` and the gradient `g` that arrives at `q`, what
they pass on to `x` is

    DASR    g * c * coth((|1 - 2t| + a) / 2)                    a = 1 / sigma**2, c = gamma / (2 sinh gamma)
    STE     g
    EWGS    g * (1 + delta * sign(g) * (x - q) / n)             levels span [0, 1], so `x - q` is divided by n
    DSQ     g * k / (2 tanh(k / 2)) * sech(k (t - 1/2))**2      tanh(k / 2) = 1 - alpha
    LSQ     g                                                   with a step size of its own: `quantizers.lsq`

References: DASR: Kim, Lee, Ham, "Distance-aware Quantization", ICCV 2021, equations 6-11; the closed form is derived
in `docs/method.md` and bound to the literal equations of `reference.py` by the tests. STE: Bengio, Leonard, Courville,
arXiv 1308.3432, 2013. EWGS: Lee, Kim, Ham, "Network Quantization with Element-wise Gradient Scaling", CVPR 2021,
equation 5. DSQ: Gong et al., "Differentiable Soft Quantization", ICCV 2019, equations 4-8. LSQ: Esser et al., "Learned
Step Size Quantization", ICLR 2020, equations 1-3.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from daqconvert.errors import DaqError

KINDS = ("ste", "daq", "ewgs", "dsq")
"""The gradients that a rounding can have; operators take the index of one."""

STE, DAQ, EWGS, DSQ = range(len(KINDS))


def dasr(x: Tensor, n: int, gamma: float = 2.0, sigma: float = 1.0) -> Tensor:
    """Round to levels `0 .. n`, with the distance-aware gradient.

    `y = round(clip(x, 0, n))`; `dy/dx = gamma / (2 sinh gamma) * coth((|1 - 2t| + 1 / sigma**2) / 2)` where
    `0 <= x <= n` and 0 elsewhere, with `t = x - floor(x)`.

    Args:
        x: float32, float64, bfloat16 or float16, any shape, in level units.
        n: Highest level, `2**bits - 1`.
        gamma: Temperature, positive; 2 in the paper.
        sigma: Kernel width, positive; 1 for weights and 2 for activations in the paper.

    Returns:
        Integer-valued tensor of the shape and dtype of `x`.

    Raises:
        DaqError: If `n`, `gamma` or `sigma` is not positive and finite, or `x` not floating point; on a second
            derivative.

    Reference: "Distance-aware Quantization" (Kim, Lee, Ham, ICCV 2021), equations 6-11.

    Example:
        >>> x = torch.tensor([0.4, 1.5, 9.0], requires_grad=True)
        >>> y = dasr(x, 3); y.sum().backward()
        >>> y.tolist(), [round(g, 2) for g in x.grad.tolist()]
        ([0.0, 2.0, 3.0], [0.51, 0.6, 0.0])
    """
    if not (n >= 1 and 0 < gamma < math.inf and 0 < sigma < math.inf):
        raise DaqError(
            f"dasr: n, gamma and sigma must be positive and finite; found n={n!r}, gamma={gamma!r}, sigma={sigma!r}."
        )
    if not x.is_floating_point():
        raise DaqError(f"dasr: expected a floating-point tensor, found {x.dtype}. Call x.float() first.")
    c, a = slope_coefficients(gamma, sigma)
    return clip_round(wide(x), 0.0, float(n), "daq", c, a).to(x.dtype)


def round_half_even(x: Tensor) -> Tensor:
    """Round to the nearest integer, ties to the even one: the only rounding of this project.

    Example:
        >>> round_half_even(torch.tensor([0.5, 1.5, 2.5])).tolist()
        [0.0, 2.0, 2.0]
    """
    return torch.round(x)


def wide(x: Tensor) -> Tensor:
    """Return `x` in the dtype of all arithmetic here: float64 stays, everything else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


def clip_round(
    x: Tensor, low: Tensor | float, high: Tensor | float, rounding: str | None = None, c: float = 1.0, a: float = 1.0,
    ends: bool = True,
) -> Tensor:  # fmt: skip
    """Return `round(clip(x, low, high))`: what every quantizer of this project does in level units.

    `low` and `high` are integer-valued, numbers or tensors that broadcast. With a `rounding` of `KINDS`, its constants
    `c` and `a` as in `through_rounding`, the gradient is that of the rounding inside the clip and 0 outside; `ends`
    says whether it passes at `low` and `high` themselves. Without a rounding there are only values, no gradient.
    """
    if rounding is None:
        return round_half_even(torch.clamp(x, low, high))  # type: ignore[arg-type] # to its stub both are tensors
    out: Tensor = _ClipRound.apply(x, low, high, KINDS.index(rounding), c, a, ends)
    return out


class _ClipRound(torch.autograd.Function):
    """`clip_round` with the gradient of a rounding inside the clip.

    Whether the clip's two ends count as inside is decided here, not left to `torch.clamp`: its gradient there was 1
    for years and is 0 in torch 2.14, and every zero that comes out of a ReLU lies on an end.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: Any, high: Any, kind: int, c: float, a: float, ends: bool) -> Tensor:
        ctx.save_for_backward(x)
        ctx.constants = (low, high, kind, c, a, ends)
        return clip_round(x, low, high)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        return _ClipRoundBackward.apply(grad, x, *ctx.constants), None, None, None, None, None, None


class _ClipRoundBackward(torch.autograd.Function):
    """The first derivative as a function of its own, so that the second can be refused with a clear error."""

    @staticmethod
    def forward(
        ctx: Any, grad: Tensor, x: Tensor, low: Any, high: Any, kind: int, c: float, a: float, ends: bool
    ) -> Tensor:
        inside = (x >= low) & (x <= high) if ends else (x > low) & (x < high)
        return torch.where(inside, through_rounding(grad, x, kind, c, a), 0.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return refuse(ctx, *grads)


def refuse(ctx: Any, *grads: Any) -> Any:
    """Raise `DaqError`: this is the backward of every backward, because no operator has a second derivative."""
    raise DaqError(
        "dasr has no second derivative: its slope holds the temperature controller constant. "
        "Drop create_graph=True, or compute the penalty under `with daqconvert.disabled(model):`."
    )


def through_rounding(grad: Tensor, x: Tensor, kind: int, c: float, a: float) -> Tensor:
    """Return the gradient to `x` from that to `q = round(x)`; `kind` is an index into `KINDS`.

    What `c` and `a` are depends on the kind. `c` is the height of the slope (daq, dsq) or `delta / n` (ewgs), `a` the
    offset of the slope (daq) or its steepness `k` (dsq).
    """
    if kind == STE:
        return grad
    if kind == EWGS:  # grad * (1 + c * sign(grad) * (x - q))
        return grad + grad.abs() * ((x - round_half_even(x)) * c)
    return grad * (dsq_slope(x, c, a) if kind == DSQ else slope(x, c, a))


def slope_coefficients(gamma: float, sigma: float, unit: bool = False) -> tuple[float, float]:
    """Return `(c, a)` of the slope `c * coth((|1 - 2t| + a) / 2)`.

    Args:
        gamma: Temperature, positive.
        sigma: Kernel width, positive, in levels.
        unit: Scale `c` so that the mean slope over `t` in [0, 1] is 1.

    Example:
        >>> c, a = slope_coefficients(2.0, 1.0)
        >>> round(mean_slope(c, a), 2)
        0.45
    """
    # beyond sigma = 1e15 `a` would vanish and the slope at a tie be infinite: keep it positive
    a = max((1.0 / sigma) * (1.0 / sigma), 1e-30)
    if unit:
        return 1.0 / mean_slope(1.0, a), a
    # gamma / (2 sinh gamma), written so that a large gamma underflows instead of overflowing sinh
    return gamma * math.exp(-gamma) / -math.expm1(-2.0 * gamma), a


def mean_slope(c: float, a: float) -> float:
    """Return the mean of the slope over one level: `2 c ln(sinh((1 + a) / 2) / sinh(a / 2))`."""
    # log sinh(z) = z + log(1 - exp(-2z)) - log 2 holds for large a, where sinh overflows; expm1 for small a
    log_ratio = 0.5 + math.log(-math.expm1(-(1.0 + a))) - math.log(-math.expm1(-a))
    return 2.0 * c * log_ratio


def slope(x: Tensor, c: float, a: float) -> Tensor:
    """Return the slope `c * coth((|1 - 2t| + a) / 2)` at `x`, elementwise."""
    t = x - torch.floor(x)
    return c / torch.tanh(((1.0 - 2.0 * t).abs() + a) * 0.5)


def dsq_coefficients(alpha: float) -> tuple[float, float]:
    """Return `(c, k)` of the slope `c * sech(k (t - 1/2))**2`, whose mean over a level is 1.

    `k = ln((2 - alpha) / alpha)`, from `alpha = 1 - tanh(k / 2)`; `c = k / (2 (1 - alpha))`. `alpha`, in (0, 1), says
    how far the soft levels are from the hard ones.

    Example:
        >>> c, k = dsq_coefficients(0.2)
        >>> round(1.0 - math.tanh(k / 2), 9), round(c, 3)
        (0.2, 1.373)
    """
    k = math.log1p(2.0 * (1.0 - alpha) / alpha)
    return k / (2.0 * (1.0 - alpha)), k


def dsq_slope(x: Tensor, c: float, k: float) -> Tensor:
    """Return `c * sech(k (t - 1/2))**2`, the derivative of `tanh(k (t - 1/2)) / (2 tanh(k / 2)) + 1/2`."""
    t = x - torch.floor(x)
    return c / torch.cosh((t - 0.5) * k) ** 2
