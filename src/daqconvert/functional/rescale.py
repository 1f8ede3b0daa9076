"""Scale and bias of sums of products, in place and in one pass over memory."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from daqconvert.functional.native import address, kernels


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
