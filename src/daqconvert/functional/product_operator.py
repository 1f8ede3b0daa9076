"""Products of two operands, their scale and the bias as one step that keeps bytes for its backward.

    y = products(operand_x, operand_w) * S + bias

Kept are the codes of both operands and `S`, not the sums: with `G = products_backward(grad, operand_x)` the gradients
are

    to S, per channel    sum(G * operand_w)      for the sums are linear in the weight, channel by channel
    to operand_w         S * G
    to operand_x         products_backward(grad, S * operand_w)

so that nothing of the output's size is kept, or scaled in the backward.

Scale and bias of sums of products, in place and in one pass over memory.
"""

from __future__ import annotations

import math
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
from daqconvert.functional.native import address, in_memory_order, kernels, refuse, row_major, view_argument
from daqconvert.functional.products import KNOWN, Gradients, KnownProducts


def can_compile(operation: Any, x: Tensor, w: Tensor, scale: Tensor) -> bool:
    """Whether a layer is being compiled for the CPU, not exported, with known products of float32 operands.

    Elsewhere there are no kernels of ours, and the compiler does better with plain operations.

    Args:
        operation: The bare products.
        x: Input.
        w: Weight.
        scale: Output scale.
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
    """Return `operation(x, w) * scale + bias`; gradients reach all four.

    Args:
        operation: The bare products.
        x: Operand of the input.
        w: Operand of the weight.
        scale: `()` or `(C_out,)`.
        bias: `(C_out,)` or None.

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
        found, coded = codes_of(x), codes_of(w)
        kept_w = coded if isinstance(coded, WeightCodes) else None
        kept: tuple[Tensor, Tensor | None] = (x, None)
        if isinstance(found, InputCodes) and found.codes.numel() == x.numel():
            kept = found.codes, found.zero_point
        ctx.save_for_backward(*kept, w if kept_w is None else kept_w.codes, scale)
        ctx.known = operation, x.shape, None if kept_w is None else (kept_w.step, kept_w.offset)
        return rescale_(operation(x, w), scale, bias, operation.output_dims)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, zero_point, w, scale = ctx.saved_tensors
        operation, shape, of_weight = ctx.known
        kept_w = w if of_weight is None else WeightCodes(w, *of_weight)
        arguments = operation, grad, x, zero_point, kept_w, scale, shape, ctx.needs_input_grad
        return (*differentiable(_gradients, arguments), None)


def differentiable(gradients: Any, arguments: tuple[Any, ...]) -> Any:
    """Return `gradients(*arguments)`, which refuses to be differentiated where somebody keeps the graph of a backward.

    Args:
        gradients: Computes the first derivative.
        arguments: Its own.
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

    Args:
        operation: The bare products.
        grad: Of the output.
        x: Operand of the input, or its codes.
        zero_point: Of the codes; None for an operand.
        w: Operand of the weight, or its codes.
        scale: `()` or `(C_out,)`.
        shape: Of the input.
        wanted: Which of the three; None in place of the others.
    """
    operand = None
    if wanted[1]:
        operand = x if zero_point is None else expand_input(x, zero_point)
    if isinstance(w, WeightCodes):
        scaled = expand_weight(w, operation.view(w.codes.shape), scale, scale.dtype)
    else:
        scaled = scale_channels(w, operation.view(w.shape), scale)
    return operation.gradients(grad, operand, scaled, shape, wanted)


def split_gradient(
    grad: Tensor, w: Tensor | WeightCodes, operation: KnownProducts, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients to the operand of the weight and to the scale.

    Args:
        grad: To `scale * operand`; its memory may be used again.
        w: Operand of the weight, or its codes.
        operation: The bare products.
        scale: `()` or `(C_out,)`.
    """
    view: View = operation.view(grad.shape)
    library = kernels(grad, scale, w.codes) if isinstance(w, WeightCodes) else None
    if library is None or not isinstance(w, WeightCodes):
        operand = expand_weight(w, view, None, scale.dtype) if isinstance(w, WeightCodes) else w
        return scale_channels(grad, view, scale), channel_sums(grad * operand, view, scale)
    codes = row_major(w.codes, view)
    grad, of_scale = in_memory_order(grad, codes), torch.empty_like(scale)
    library.daq_scale_weight_gradient(
        grad.data_ptr(), codes.data_ptr(), view_argument(view), w.step, w.offset, address(scale),
        of_scale.data_ptr(), scale.dim() > 0, torch.get_num_threads(),
    )  # fmt: skip
    return grad, of_scale


def rescale_(acc: Tensor, scale: Tensor, bias: Tensor | None, output_dims: int) -> Tensor:
    """Compute `acc * scale + bias` in place, and return it.

    Args:
        acc: Sums that nobody else holds, float32 or float64; the channel at dimension `-1 - output_dims`.
        scale: `()` or `(C_out,)`.
        bias: `(C_out,)` or None.
        output_dims: Number of dimensions after the channel.

    Example:
        >>> rescale_(torch.tensor([[1.0, 2.0]]), torch.tensor([2.0, 3.0]), None, 0).tolist()
        [[2.0, 6.0]]
    """
    sizes = memory_sizes(acc, output_dims)
    library = None if sizes is None else kernels(acc, scale, bias)
    if sizes is not None and library is not None and (bias is None or bias.is_contiguous()):
        library.daq_rescale(
            acc.data_ptr(), acc.data_ptr(), *sizes, scale.data_ptr(), scale.dim() > 0, address(bias),
            torch.get_num_threads(),
        )  # fmt: skip
        return acc
    trailing = (1,) * output_dims
    acc.mul_(scale.reshape(-1, *trailing) if scale.dim() else scale)
    return acc if bias is None else acc.add_(bias.reshape(-1, *trailing))


def memory_sizes(acc: Tensor, output_dims: int) -> tuple[int, int, int] | None:
    """Return (outer, channels, inner) as they lie in memory, None where they do not lie so.

    Args:
        acc: Any tensor.
        output_dims: Number of dimensions after the channel.
    """
    if acc.numel() == 0:
        return None
    channels = acc.shape[-1 - output_dims]
    inner = math.prod(acc.shape[acc.dim() - output_dims :])
    if acc.is_contiguous():
        return acc.numel() // (channels * inner), channels, inner
    last = torch.channels_last if output_dims == 2 else torch.channels_last_3d
    if output_dims in (2, 3) and acc.is_contiguous(memory_format=last):
        return acc.numel() // channels, channels, 1
    return None
