"""Distance-aware soft rounding written as the paper writes it: slow, literal, differentiated by autograd.

`dasr.py` computes the same in closed form; tests check that both agree. Only tests and benchmarks import this file.

Convention: `x` is in level units, `t = x - floor(x)`, and the two levels around `x` are numbered `k = 0, 1` along a
last dimension of size 2. `k*` is the nearer level; an exact tie goes down, as in the authors' code (everywhere else
in this project ties go to the even level).

Reference: Kim, Lee, Ham, "Distance-aware Quantization", ICCV 2021, equations 6-11.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def distances(t: Tensor) -> Tensor:
    """Return `|t - k|` for `k = 0, 1`: shape `t.shape + (2,)`.

    Written without `abs`, for `t` is in [0, 1): on a level the authors' `|.|` has the gradient +1, `torch.abs` has 0.

    Example:
        >>> distances(torch.tensor([0.25])).tolist()
        [[0.25, 0.75]]
    """
    return torch.stack((t, 1.0 - t), dim=-1)


def gaussian_kernel(distance: Tensor, sigma: float) -> Tensor:
    """Return `w_k = exp(-(k - k*)**2 / sigma**2)`, centred on the nearer level `k*`; a constant for the gradient.

    Args:
        distance: Shape `(..., 2)`, from `distances`.
        sigma: Kernel width in levels.

    Example:
        >>> gaussian_kernel(torch.tensor([[0.25, 0.75]]), sigma=1.0)[0, 0].item()
        1.0
    """
    level = torch.arange(2, dtype=distance.dtype, device=distance.device)
    nearest = (distance[..., 1:] < distance[..., :1]).to(distance.dtype)
    return torch.exp(-((level - nearest) ** 2) / sigma**2)


def softmax_of_two(z: Tensor) -> Tensor:
    """Return `softmax(z)` over a last dimension of size 2, as `m_k = 1 / (1 + exp(z_j - z_k))`.

    Numerator and denominator are divided by `exp(z_k)`, so no maximum has to be subtracted (the authors' code
    subtracts the largest `z` of the whole tensor, which underflows for a large `sigma`). The gradient of
    `torch.softmax` contains `1 - m_k`, which loses digits by cancellation where `gamma` is large: 5e-12 of the float64
    gradient at `gamma = 10`. Here nothing cancels.

    Example:
        >>> z = torch.tensor([0.5, 2.0])
        >>> torch.allclose(softmax_of_two(z), torch.softmax(z, dim=-1))
        True
    """
    return 1.0 / (1.0 + torch.exp(z.flip(-1) - z))


def dasr_reference(x: Tensor, n: int, gamma: float = 2.0, sigma: float = 1.0) -> Tensor:
    """Return the soft rounding of `x` clipped to `[0, n]`; in exact arithmetic it lands on the nearer level.

    Args:
        x: float64 or float32, any shape, in level units.
        n: Highest level, `2**bits - 1`.
        gamma: Temperature.
        sigma: Kernel width in levels.

    Returns:
        Tensor of the shape and dtype of `x`, differentiable by autograd.

    Example:
        >>> x = torch.tensor([0.4, 9.0], dtype=torch.float64, requires_grad=True)
        >>> y = dasr_reference(x, 3); y.sum().backward()
        >>> [round(v, 9) for v in y.tolist()], [round(g, 2) for g in x.grad.tolist()]
        ([0.0, 3.0], [0.51, 0.0])
    """
    x = torch.where(x < 0, 0.0, torch.where(x > n, float(n), x))  # at both ends the gradient passes: see clip_round
    floor = torch.floor(x).detach()
    distance = distances(x - floor)
    score = torch.exp(-distance)  # d_k
    s = score * gaussian_kernel(distance, sigma)  # s_k = d_k * w_k
    beta = gamma / (s[..., :1] - s[..., 1:]).abs().detach()  # temperature controller
    m = softmax_of_two(beta * s)
    e = 1.0 / math.expm1(gamma)
    return floor + m[..., 0] * (0.0 - e) + m[..., 1] * (1.0 + e)  # levels stretched by e on either side
