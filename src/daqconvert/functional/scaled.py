"""Products of two operands, their scale and the bias as one step that keeps bytes for its backward.

    y = products(operand_x, operand_w) * S + bias

Kept are the codes of both operands and `S`, not the sums: with `G = products_backward(grad, operand_x)` the gradients
are

    to S, per channel    sum(G * operand_w)      for the sums are linear in the weight, channel by channel
    to operand_w         S * G
    to operand_x         products_backward(grad, S * operand_w)

so that no gradient is scaled at the size of the output, and nothing of that size is kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from daqconvert.functional.coded import (
    InputCodes,
    View,
    WeightCodes,
    channel_sums,
    codes_of,
    expand_input,
    expand_weight,
    scale_channels,
)
from daqconvert.functional.native import address, in_memory_order, kernels, row_major, view_argument
from daqconvert.functional.products import ConvolutionProducts, KnownProducts, LinearProducts
from daqconvert.functional.registration import refuse


def can_fuse(operation: Any, x: Tensor, w: Tensor, scale: Tensor, bias: Tensor | None) -> bool:
    """Whether `scaled_products` takes this: known products of float32 (or float64) operands, outside of a compiler."""
    if torch.compiler.is_compiling() or not isinstance(operation, (LinearProducts, ConvolutionProducts)):
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
        coded_x, coded_w = codes_of(x), codes_of(w)
        ctx.operation, ctx.shape = operation, x.shape
        ctx.weight = (coded_w.step, coded_w.offset) if isinstance(coded_w, WeightCodes) else None
        bytes_x = isinstance(coded_x, InputCodes) and coded_x.codes.numel() == x.numel()
        kept_x = (coded_x.codes, coded_x.zero_point) if bytes_x and isinstance(coded_x, InputCodes) else (x, None)
        kept_w = coded_w.codes if isinstance(coded_w, WeightCodes) else w
        ctx.save_for_backward(*kept_x, kept_w, scale)
        return rescale_(operation(x, w), scale, bias, operation.output_dims)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, zero_point, w, scale = ctx.saved_tensors
        needs = ctx.needs_input_grad[:4]
        known = (ctx.operation, ctx.shape, ctx.weight, needs)
        if torch.is_grad_enabled():  # create_graph=True
            return (*_ScaledProductsBackward.apply(grad, x, zero_point, w, scale, known), None)
        return (*_gradients(grad, x, zero_point, w, scale, known), None)


class _ScaledProductsBackward(torch.autograd.Function):
    """The first derivative as a function of its own, so that the second can be refused with a clear error."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        return _gradients(*args)

    backward = staticmethod(refuse)


def _gradients(
    grad: Tensor, x: Tensor, zero_point: Tensor | None, w: Tensor, scale: Tensor, known: Any
) -> tuple[Tensor | None, ...]:
    operation, shape, weight, needs = known
    view = operation.view(w.shape)
    coded = None if weight is None else WeightCodes(w, *weight)
    of_weight = needs[1] or needs[2]
    operand = None
    if of_weight:
        operand = x if zero_point is None else expand_input(x, zero_point)
    scaled = scale_channels(w, view, scale) if coded is None else expand_weight(coded, view, scale, scale.dtype)
    of_x, of_w, of_bias = operation.gradients(grad, operand, scaled, shape, (needs[0], of_weight, needs[3]))
    del operand, scaled
    if of_w is None:
        return of_x, None, None, of_bias
    of_w, of_scale = _split(of_w, coded, w, view, scale)
    return of_x, of_w, of_scale, of_bias


def _split(grad: Tensor, coded: WeightCodes | None, w: Tensor, view: View, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients to the operand of the weight and to the scale, from that to `scale * operand`."""
    library = None if coded is None else kernels(grad, scale, coded.codes)
    if coded is None or library is None:
        operand = w if coded is None else expand_weight(coded, view, None, scale.dtype)
        return scale_channels(grad, view, scale), channel_sums(grad * operand, view, scale)
    codes = row_major(coded.codes, view)
    grad, of_scale = in_memory_order(grad, codes), torch.empty_like(scale)
    library.daq_scale_weight_gradient(
        grad.data_ptr(), codes.data_ptr(), view_argument(view), coded.step, coded.offset, address(scale),
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
    sizes = _memory_sizes(acc, output_dims)
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


def _memory_sizes(acc: Tensor, output_dims: int) -> tuple[int, int, int] | None:
    """Return (outer, channels, inner) as they lie in memory, None where they do not lie so."""
    if acc.numel() == 0:
        return None
    channels = acc.shape[-1 - output_dims]
    inner = 1
    for size in acc.shape[acc.dim() - output_dims :]:
        inner *= size
    if acc.is_contiguous():
        return acc.numel() // (channels * inner), channels, inner
    last = torch.channels_last if output_dims == 2 else torch.channels_last_3d
    if output_dims in (2, 3) and acc.is_contiguous(memory_format=last):
        return acc.numel() // channels, channels, 1
    return None
