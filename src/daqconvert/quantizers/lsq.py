"""Learned step size quantization (LSQ): quantizers whose one parameter is their step size `s`, the paper's word.

    v_q = clip(round(v / s), -Q_n, Q_p) * s

With `b` bits, weights and signed inputs have `Q_n = 2**(b - 1)` and `Q_p = Q_n - 1`, unsigned inputs `Q_n = 0` and
`Q_p = 2**b - 1`. The operators take the bounds `lower = -Q_n * s` and `upper = Q_p * s`. The gradients to both add up
to `round(v / s) - v / s` inside the bounds and to `-Q_n` or `Q_p` outside; the gradient to `s` is `1 / sqrt(N * Q_p)`
of that, where `N` is the number of weights that share the step size, or of the input's elements per sample.

Reference: "Learned Step Size Quantization" (Esser et al., ICLR 2020), equations 1-3 and section 2.2.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from daqconvert.functional.grid import levels
from daqconvert.quantizers.base import Quantizer
from daqconvert.quantizers.input import InputQuantizer, alive
from daqconvert.quantizers.starting import check_width
from daqconvert.quantizers.weight import WeightQuantizer


def lsq_start(mean: Tensor | float, top: int) -> Tensor | float:
    """Return the starting value of a step size, `2 mean / sqrt(Q_p)`: `mean` is that of `|v|`, `top` is `Q_p`.

    Example:
        >>> lsq_start(1.0, 1)
        2.0
    """
    return 2.0 * mean / math.sqrt(top)


def _multiple(step: Tensor, times: int, factor: float) -> Tensor:
    """Return `step * times`, exactly, with the gradient to `step` multiplied by `factor`."""
    value = step.detach() * times
    if not (torch.is_grad_enabled() and step.requires_grad):
        return value
    return value + (step - step.detach()) * (times * factor)


class StepWeightQuantizer(WeightQuantizer):
    """The weight quantizer of LSQ: all `2**b` levels of two's complement, `upper` and `lower` follow the step size.

    Attributes:
        step: Step size, parameter of shape `(1,)` or `(C_out,)`.

    Reference: "Learned Step Size Quantization" (Esser et al., ICLR 2020), equations 1-3.

    Example:
        >>> from daqconvert.quantizers import ChannelLayout
        >>> from daqconvert.spec import Settings
        >>> s = Settings(w_bits=2, rounding="lsq", grid="twos", normalize=False, granularity="tensor")
        >>> quantizer = StepWeightQuantizer(s, ChannelLayout.forward((1, 3)))
        >>> quantizer.initialize(torch.tensor([[-1.0, 0.25, 0.25]]))
        >>> quantizer.step.item(), quantizer.lower.item(), quantizer.upper.item()
        (1.0, -2.0, 1.0)
    """

    step: Tensor

    def _make_bounds(self, start: Tensor) -> None:
        self.step = nn.Parameter(start.clone())

    @property
    def upper(self) -> Tensor:  # type: ignore[override]
        """`Q_p * step`, which carries the gradient of the step size."""
        count = math.prod(self.layout.view) / self.step.numel()
        return _multiple(self.step, self.top, 1.0 / math.sqrt(max(count, 1.0) * self.top))

    @property
    def lower(self) -> Tensor:  # type: ignore[override]
        """`-Q_n * step`, without gradient."""
        return self.step.detach() * -(self.top + 1)

    def _start_bounds(self, weight: Tensor, method: str) -> None:
        rows = self.layout.rows(weight) if self.per_channel else weight.reshape(1, -1)
        mean = rows.abs().mean(dim=1, dtype=torch.promote_types(weight.dtype, torch.float32))
        mean = torch.where(mean > 0, mean, mean.max() if mean.any() else rows.shape[1] ** -0.5)  # 0 would stay 0
        self.step.copy_(torch.as_tensor(lsq_start(mean, self.top)).reshape(self.step.shape))

    def _rescale_bounds(self, bits: int) -> None:
        self.step.mul_(math.sqrt(self.top / levels(bits, self.grid)))  # the ratio of `lsq_start` at the two widths

    def extra_repr(self) -> str:
        """Return bits, grid and granularity for `print(model)`."""
        return f"{super().extra_repr().removesuffix(self.rounding.kind)}lsq"

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        Quantizer._save_to_state_dict(self, destination, prefix, keep_vars)


class StepInputQuantizer(InputQuantizer):
    """The input quantizer of LSQ: `upper` and `lower` follow the step size; `zero_point` is `Q_n`.

    Attributes:
        step: Step size, parameter of shape `(1,)`.
        features: `N`, the elements per sample of the last input.

    Reference: "Learned Step Size Quantization" (Esser et al., ICLR 2020), equations 1-3.

    Example:
        >>> from daqconvert.spec import Settings
        >>> quantizer = StepInputQuantizer(Settings(a_bits=2, rounding="lsq"), signed=True)
        >>> quantizer.set_bounds(*quantizer.start(mean=0.5, signed=True))
        >>> quantizer(torch.tensor([-9.0, -1.2, 0.4, 9.0])).tolist()
        [-2.0, -1.0, 0.0, 1.0]
    """

    step: Tensor
    by_mean = True
    features: int = 1

    def _make_bounds(self, one: Tensor) -> None:
        self.step = nn.Parameter(one)

    def ends(self, signed: bool) -> tuple[int, int]:
        """Return `Q_n` and `Q_p`."""
        half = 2 ** (self.bits - 1)
        return (half, half - 1) if signed else (0, 2 * half - 1)

    def start(self, mean: float, signed: bool) -> tuple[float, float]:
        """Return the bounds to start with, for inputs whose mean absolute value is `mean`."""
        low, high = self.ends(signed)
        step = float(lsq_start(mean, high))
        return -low * step, high * step

    @property
    def upper(self) -> Tensor:  # type: ignore[override]
        """`Q_p * step`, which carries the gradient of the step size."""
        return _multiple(alive(self.step), self.ends(self.sign is True)[1], self._factor())

    @property
    def lower(self) -> Tensor:  # type: ignore[override]
        """`-Q_n * step`, which carries the gradient of the step size where the input is signed."""
        if self.sign is not True:
            return torch.zeros_like(self.step.detach())
        return _multiple(alive(self.step), -self.ends(True)[0], self._factor())

    def _factor(self) -> float:
        return 1.0 / math.sqrt(max(self.features, 1) * self.ends(self.sign is True)[1])

    def _see(self, x: Tensor) -> None:
        self.features = math.prod(x.shape[1:]) if x.dim() > 1 else x.numel()

    def _reads_lower(self) -> bool:
        return self.sign is True

    def _write_bounds(self, lower: float, upper: float) -> None:
        low, high = self.ends(self.sign is True)
        self.step.fill_(max(upper / high, -lower / low if low else 0.0))

    def _rescale_bounds(self, bits: int) -> None:
        check_width(self.layer_name, "a_bits", bits, 2)
        before = self.ends(self.sign is True)[1]
        after = 2 ** (bits - (self.sign is True)) - 1
        self.step.mul_(math.sqrt(before / after))  # the ratio of `lsq_start` at the two widths

    def _settle_average(self, share: float) -> None:
        Quantizer._settle_average(self, share)

    def extra_repr(self) -> str:
        """Return bits and sign for `print(model)`."""
        return f"{super().extra_repr().removesuffix(self.rounding.kind)}lsq"
