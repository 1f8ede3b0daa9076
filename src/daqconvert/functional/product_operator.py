"""Products of two operands, their scale and the bias as one autograd function that keeps bytes for its backward.

    y = products(operand_x, operand_w) * S + bias

Kept are the codes of both operands and `S`, not the sums: with `G = products_backward(grad, operand_x)` the gradients
are

    to S, per channel    sum(G * operand_w)      for the sums are linear in the weight, channel by channel
    to operand_w         S * G
    to operand_x         products_backward(grad, S * operand_w)

so that nothing of the output's size is kept, or multiplied by a scale in the backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from daqconvert.functional.codes import (
    InputCodes,
    View,
    WeightCodes,
    channel_sums,
    codes_of,
    expand_input,
    expand_weight,
    scale_channels,
)
from daqconvert.functional.dasr import refuse
from daqconvert.functional.grid import coding
from daqconvert.functional.native import address, in_memory_order, kernels, row_major, view_argument
from daqconvert.functional.products import KNOWN, Gradients, KnownProducts, rescale_


def can_compile(operation: Any, x: Tensor, w: Tensor, scale: Tensor) -> bool:
    """Whether a layer is being compiled for the CPU, not exported, with known products of float32 operands.

    Elsewhere this project has no kernels, and the compiler does better with plain operations.
    """
    if not torch.compiler.is_compiling() or torch.compiler.is_exporting() or not isinstance(operation, KNOWN):
        return False
    same = x.dtype == w.dtype == scale.dtype == torch.float32 and x.device.type == "cpu"
    return same and operation.accepts(x, w) and not torch.is_autocast_enabled(x.device.type)


def can_fuse(operation: Any, x: Tensor, w: Tensor, scale: Tensor, bias: Tensor | None) -> bool:
    """Whether `scaled_products` takes this: known products of float32 (or float64) operands, outside of a compiler."""
    if torch.compiler.is_compiling() or not isinstance(operation, KNOWN):
        return False
    same = x.dtype == w.dtype == scale.dtype and (bias is None or bias.dtype == x.dtype)
    wide = x.dtype in (torch.float32, torch.float64) and (bias is None or bias.dim() == 1)
    return same and wide and operation.accepts(x, w) and not torch.is_autocast_enabled(x.device.type)


def scaled_products(operation: KnownProducts, x: Tensor, w: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Return `operation(x, w) * scale + bias` of two operands; gradients reach all four tensors.

    The scale of the sums is `()`, `(1,)` or `(C_out,)`, the bias `(C_out,)` or None.

    Raises:
        DaqError: On a second derivative.

    Example:
        >>> from daqconvert.functional.products import LinearProducts
        >>> x, w = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, -1.0]])
        >>> scaled_products(LinearProducts(), x, w, torch.tensor(0.5), torch.tensor([1.0])).tolist()
        [[1.5]]
    """
    out: Tensor = _ScaledProducts.apply(x, w, scale, bias, operation)
    return out


class _ScaledProducts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, scale: Tensor, bias: Tensor | None, operation: KnownProducts
    ) -> Tensor:
        of_x, of_w = codes_of(x), codes_of(w)
        kept_x: tuple[Tensor, Tensor | None] = (x, None)
        if isinstance(of_x, InputCodes) and of_x.codes.numel() == x.numel():
            kept_x = of_x.codes, of_x.zero_point
        kept_w = of_w if isinstance(of_w, WeightCodes) else None
        ctx.save_for_backward(*kept_x, w if kept_w is None else kept_w.codes, scale)
        ctx.known = operation, x.shape, None if kept_w is None else (kept_w.bits, kept_w.grid)
        return rescale_(operation(x, w), scale, bias, operation.output_dims)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, zero_point, w, scale = ctx.saved_tensors
        operation, shape, of_weight = ctx.known
        kept_w = w if of_weight is None else WeightCodes(w, *of_weight)
        arguments = operation, grad, x, zero_point, kept_w, scale, shape, ctx.needs_input_grad
        return (*differentiable(_gradients, arguments), None)


def differentiable(gradients: Any, arguments: tuple[Any, ...]) -> Any:
    """Return the first derivative `gradients(*arguments)`; under `create_graph=True` a second derivative raises.

    For that, every tensor has to be an argument of its own: autograd does not look into containers.
    """
    if torch.is_grad_enabled():  # create_graph=True
        return _Backward.apply(gradients, *arguments)
    return gradients(*arguments)


class _Backward(torch.autograd.Function):
    """A first derivative as a function of its own, so that the second can be refused with a clear error."""

    @staticmethod
    def forward(ctx: Any, gradients: Any, *arguments: Any) -> Any:
        return gradients(*arguments)

    backward = staticmethod(refuse)


def _gradients(
    operation: KnownProducts, grad: Tensor, x: Tensor, zero_point: Tensor | None, w: Tensor | WeightCodes,
    scale: Tensor, shape: torch.Size, needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    wanted = needs[0], needs[1] or needs[2], needs[3]
    of_x, of_w, of_bias = product_gradients(operation, grad, x, zero_point, w, scale, shape, wanted)
    if of_w is None:
        return of_x, None, None, of_bias
    of_w, of_scale = split_gradient(of_w, w, operation, scale)
    return of_x, of_w, of_scale, of_bias


def product_gradients(
    operation: KnownProducts, grad: Tensor, x: Tensor, zero_point: Tensor | None, w: Tensor | WeightCodes,
    scale: Tensor, shape: torch.Size, wanted: tuple[bool, bool, bool],
) -> Gradients:  # fmt: skip
    """Return the gradients to the operand of the input, to `scale * operand` of the weight, and to the bias.

    Those that are not wanted are None. `x` is the operand of the input or, if `zero_point` is given, its codes; `w` is
    the operand of the weight or its codes; `scale` is the scale of the sums; `shape` is that of the input.
    """
    operand_x = None
    if wanted[1]:
        operand_x = x if zero_point is None else expand_input(x, zero_point)
    if isinstance(w, WeightCodes):
        scaled_w = expand_weight(w, operation.view(w.codes.shape), scale, scale.dtype)
    else:
        scaled_w = scale_channels(w, operation.view(w.shape), scale)
    return operation.gradients(grad, operand_x, scaled_w, shape, wanted)


def split_gradient(
    grad: Tensor, w: Tensor | WeightCodes, operation: KnownProducts, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients to the operand of the weight and to the scale from `grad`, that to their product.

    `w` is the operand or its codes. The memory of `grad` may be overwritten.
    """
    view: View = operation.view(grad.shape)
    library = kernels(grad, scale, w.codes) if isinstance(w, WeightCodes) else None
    if library is None or not isinstance(w, WeightCodes):
        operand = expand_weight(w, view, None, scale.dtype) if isinstance(w, WeightCodes) else w
        return scale_channels(grad, view, scale), channel_sums(grad * operand, view, scale)
    codes = row_major(w.codes, view)
    grad, of_scale = in_memory_order(grad, codes), torch.empty_like(scale)
    library.daq_scale_weight_gradient(
        grad.data_ptr(), codes.data_ptr(), view_argument(view), *coding(w.bits, w.grid), address(scale),
        of_scale.data_ptr(), scale.numel() > 1, torch.get_num_threads(),
    )  # fmt: skip
    return grad, of_scale
