"""The scale of a layer's sums, `S = |output_scale| * weight step * input step`, and its gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from daqconvert.functional.native import address, kernels


def combine_scale(
    output_scale: Tensor, upper: Tensor | None, top: int, step: Tensor | None, weight_step: float, input_step: float
) -> Tensor:
    """Return `S`, in the shape of `output_scale`.

    Args:
        output_scale: `()` or `(C_out,)`.
        upper: Bound of the weight, whose step is `max(upper, 0) / top`; None where it is `weight_step`.
        top: Largest operand of the weight.
        step: Step of the input; None where it is `input_step`.
        weight_step: Of a weight without units.
        input_step: Of an input without units.

    Example:
        >>> combine_scale(torch.tensor([-2.0]), torch.tensor([7.0]), 7, torch.tensor(0.5), 0.0, 0.0).tolist()
        [1.0]
    """
    library = kernels(output_scale, upper, step)
    if library is None:
        of_weight = weight_step if upper is None else upper.clamp(min=0.0) / top
        return output_scale.abs() * of_weight * (input_step if step is None else step)
    total = torch.empty_like(output_scale)
    library.daq_combine_scale(
        output_scale.data_ptr(), address(upper), address(step), total.data_ptr(), total.numel(), top, weight_step,
        input_step,
    )  # fmt: skip
    return total


def add_scale_gradients(
    grad: Tensor, output_scale: Tensor, upper: Tensor | None, top: int, step: Tensor | None, weight_step: float,
    input_step: float, grad_upper: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the gradients to `output_scale` and to `step`; that to `upper` is added to `grad_upper`.

    Args:
        grad: Of `S`.
        output_scale: As it went in, like the others.
        upper: Bound, or None.
        top: Largest operand of the weight.
        step: Of the input, or None.
        weight_step: Of a weight without units.
        input_step: Of an input without units.
        grad_upper: Changed in place where `upper` is given.
    """
    library = kernels(grad, output_scale, upper, step, grad_upper)
    if library is None:
        of_input = input_step if step is None else step
        of_weight = weight_step if upper is None else upper.clamp(min=0.0) / top
        size = grad * output_scale.abs()
        if upper is not None:
            grad_upper += torch.where(upper > 0, size * of_input / top, 0.0)
        return grad * of_weight * of_input * output_scale.sign(), (size * of_weight).sum()
    of_scale, of_step = torch.empty_like(output_scale), torch.empty((), dtype=grad.dtype)
    library.daq_combine_scale_backward(
        grad.data_ptr(), output_scale.data_ptr(), address(upper), address(step), of_scale.data_ptr(),
        grad_upper.data_ptr(), of_step.data_ptr(), grad.numel(), top, weight_step, input_step,
    )  # fmt: skip
    return of_scale, of_step
