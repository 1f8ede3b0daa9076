"""The input quantizer as a compiler should see it: a forward for it to fuse, and a backward of one operator.

Left to itself a compiler sums the gradient of each bound in a pass of its own, and computes the slope again in each
pass. Values are those of `functional.fused_input`, bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from daqconvert.functional.dasr import round_half_even


class CompiledInput(torch.autograd.Function):
    """`clip(round(x / step), -zero_point, top - zero_point)`, `step` and `zero_point` without gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, lower: Tensor, upper: Tensor, step: Tensor, zero_point: Tensor, bits: int, ste: bool,
        c: float, a: float,
    ) -> Tensor:  # fmt: skip
        """Return the operand.

        Args:
            ctx: Of the backward.
            x: float32.
            lower: Bound, for its gradient.
            upper: Likewise.
            step: Scale.
            zero_point: Zero point.
            bits: 1 to 8.
            ste: Whether the slope of the rounding is 1.
            c: Else its height.
            a: And its offset.
        """
        ctx.save_for_backward(x, lower, upper, step, zero_point)
        ctx.constants = bits, ste, c, a
        return round_half_even(torch.clamp(x / step, -zero_point, (2**bits - 1) - zero_point))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients to `x` and the bounds.

        Args:
            ctx: Of the forward.
            grad: Of the operand.
        """
        found = torch.ops.daqconvert.quantize_input_backward.default(grad, None, *ctx.saved_tensors, *ctx.constants)
        return (*found, None, None, None, None, None, None)
