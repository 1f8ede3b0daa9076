"""The published alternatives to DASR, in its frame: the same forward, another gradient of the rounding.

Convention: `x` in level units, `q = round(x)`, `t = x - floor(x)`, `g` the gradient that arrives at `q`.

    STE     g
    EWGS    g * (1 + delta * sign(g) * (x - q) / n)             levels span [0, 1], so `x - q` is divided by n
    DSQ     g * k / (2 tanh(k / 2)) * sech(k (t - 1/2))**2      tanh(k / 2) = 1 - alpha
    LSQ     g                                                   with a step of its own: `quantizers.lsq`

References: STE: Bengio, Leonard, Courville, arXiv 1308.3432, 2013. EWGS: Lee, Kim, Ham, "Network Quantization with
Element-wise Gradient Scaling", CVPR 2021, equation 5. DSQ: Gong et al., "Differentiable Soft Quantization", ICCV 2019,
equations 4-8. LSQ: Esser et al., "Learned Step Size Quantization", ICLR 2020, equations 1-3.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def dsq_coefficients(alpha: float) -> tuple[float, float]:
    """Return `(c, k)` of the slope `c * sech(k (t - 1/2))**2`, whose mean over a level is 1.

    `k = ln((2 - alpha) / alpha)`, from `alpha = 1 - tanh(k / 2)`; `c = k / (2 (1 - alpha))`.

    Args:
        alpha: How far the soft levels are from the hard ones, in (0, 1).

    Example:
        >>> c, k = dsq_coefficients(0.2)
        >>> round(1.0 - math.tanh(k / 2), 9), round(c, 3)
        (0.2, 1.373)
    """
    k = math.log1p(2.0 * (1.0 - alpha) / alpha)
    return k / (2.0 * (1.0 - alpha)), k


def dsq_slope(x: Tensor, c: float, k: float) -> Tensor:
    """Return `c * sech(k (t - 1/2))**2`, elementwise: the derivative of `tanh(k (t - 1/2)) / (2 tanh(k / 2)) + 1/2`.

    Args:
        x: In level units.
        c: From `dsq_coefficients`.
        k: Likewise.
    """
    t = x - torch.floor(x)
    return c / torch.cosh((t - 0.5) * k) ** 2
