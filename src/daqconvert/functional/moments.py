"""Mean and standard deviation of a normalized weight as one operator, the same in every program.

A compiler sums in an order of its own. The last bit of a moment is then another one, and training leaves many weights
right between two levels: one code that differs in a layer of 36,864 weights gave 49 of 5,000 images another class
(ResNet-20, W2A2). So a compiler calls what eager PyTorch calls, and sums go in the order of the indices, whatever the
weight's layout in memory is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from daqconvert.functional.native import refuse, register


def weight_moments(weight: Tensor, view: Sequence[int], bound_view: Sequence[int] | None) -> tuple[Tensor, Tensor]:
    """Return mean and unbiased std, without gradient, float32 at least; a constant channel has its own size as std.

    Args:
        weight: Any floating dtype.
        view: Shape in which `bound_view` has its channels.
        bound_view: Shape of a bound against it, 1 where it is summed over; None for one mean and std of all.

    Returns:
        Two tensors `(channels,)`, `(1,)` for all.

    Example:
        >>> mean, std = weight_moments(torch.tensor([[1.0, 3.0], [5.0, 5.0]]), (2, 2), (2, 1))
        >>> mean.tolist(), std.tolist()
        ([2.0, 0.0], [1.4142135381698608, 5.0])
    """
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        found: tuple[Tensor, Tensor] = torch.ops.daqconvert.weight_moments.default(
            weight.detach(), list(view), None if bound_view is None else list(bound_view)
        )
        return found
    return _moments(weight.detach(), view, bound_view)


def _moments(weight: Tensor, view: Sequence[int], bound_view: Sequence[int] | None) -> tuple[Tensor, Tensor]:
    v = (weight if weight.dtype == torch.float64 else weight.float()).contiguous().reshape(view)
    if bound_view is None:
        return v.mean().reshape(1), v.std().reshape(1)
    dims = [d for d, size in enumerate(bound_view) if size == 1] or [v.dim() - 1]
    mean = v.mean(dims, keepdim=True)
    single = v.numel() == math.prod(bound_view)  # the unbiased std of one element is 0 / 0
    std = torch.zeros_like(mean) if single else v.std(dims, keepdim=True)
    constant = std <= mean.abs() * 1e-7
    own = torch.where(mean == 0, 1.0, mean.abs())
    return torch.where(constant, 0.0, mean).reshape(-1), torch.where(constant, own, std).reshape(-1)


def _fake(weight: Tensor, view: Sequence[int], bound_view: Sequence[int] | None) -> tuple[Tensor, Tensor]:
    count = math.prod(bound_view or ())
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return weight.new_empty((count,), dtype=wide), weight.new_empty((count,), dtype=wide)


register("weight_moments(Tensor weight, int[] view, int[]? bound_view) -> (Tensor, Tensor)", _moments, _fake, refuse)
