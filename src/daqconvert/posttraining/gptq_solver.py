"""The solver: levels for one weight from the second moments of its inputs.

Everything is `(G, ...)`: a grouped layer is `G` small problems, a layer without groups is one.

Inputs of a layer as columns: what each output of it is a product of the weight's rows with.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from daqconvert.functional.products import ConvolutionProducts, LinearProducts, PaddedProducts
from daqconvert.layers.site import Operation

BLOCK = 128  # columns whose errors are carried on at once: one product with a large matrix instead of many with rows
TINY = 1e-10


def second_order_levels(
    weight: Tensor, own: Tensor, step: Tensor, nearest: Callable[[Tensor], Tensor], damping: float
) -> Tensor:
    """Return operands `Q`, the levels with which `Q * step` multiplies `X` nearly as `weight` does.

    Column after column is rounded, the one with the largest input first, and its error is made up for by all columns
    that are not yet rounded: `w_j -= (w_i - q_i) U_ij / U_ii`, where `U^T U = (X X^T + d I)^-1` (equation 3; its upper
    triangular form, and blocks of columns: section 3, steps 2 and 3).

    Args:
        weight: Shape `(G, R, K)`.
        own: Second moments of the inputs, `X X^T`, shape `(G, K, K)`.
        step: What one operand step is worth, shape `(G, R)`.
        nearest: From weights in steps, shape `(G, R)`, to operands on the grid.
        damping: `d` as a share of the mean of the diagonal of `X X^T`; without any, directions that no input has
            would be arbitrary.

    Returns:
        Operands in float64, shape of `weight`.

    Example:
        >>> moments = torch.tensor([[[1.0, 0.9], [0.9, 1.0]]])
        >>> w = torch.tensor([[[0.4, 0.4]]])
        >>> second_order_levels(w, moments, torch.ones(1, 1), torch.round, damping=0.01).tolist()
        [[[0.0, 1.0]]]
    """
    weight, own, step = weight.double(), own.double(), step.double().clamp(min=TINY)
    order = own.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
    places = order[:, None, :].expand_as(weight)
    left = weight.gather(2, places)
    own = own + _ridge(own, damping)
    own = own.gather(1, order[:, :, None].expand_as(own)).gather(2, order[:, None, :].expand_as(own))
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(own)), upper=True)
    found = torch.empty_like(left)
    for start in range(0, left.shape[2], BLOCK):
        stop = min(start + BLOCK, left.shape[2])
        errors = torch.empty_like(left[:, :, start:stop])
        for j in range(start, stop):
            column = left[:, :, j]
            found[:, :, j] = nearest(column / step)
            error = (column - found[:, :, j] * step) / upper[:, j, j, None]
            left[:, :, j + 1 : stop] -= error[:, :, None] * upper[:, j, None, j + 1 : stop]
            errors[:, :, j - start] = error
        left[:, :, stop:] -= errors @ upper[:, start:stop, stop:]
    return torch.empty_like(found).scatter_(2, places, found)


def output_error(levels: Tensor, weight: Tensor, own: Tensor) -> float:
    """Return `|| (levels - weight) X ||^2 / || weight X ||^2`; 0 where the weight's products are 0.

    Args:
        levels: A weight on its grid, shape `(G, R, K)`.
        weight: The weight it stands for.
        own: `X X^T`, shape `(G, K, K)`.
    """
    own = own.double()
    whole = _power(weight.double(), own)
    return _power(levels.double() - weight.double(), own) / whole if whole > 0 else 0.0


def _power(weight: Tensor, own: Tensor) -> float:
    return float(((weight @ own) * weight).sum())


def _ridge(own: Tensor, damping: float) -> Tensor:
    mean = own.diagonal(dim1=1, dim2=2).mean(dim=1).clamp(min=TINY)  # a group that no input reaches stays as it is
    return damping * mean[:, None, None] * torch.eye(own.shape[1], dtype=own.dtype, device=own.device)


MOST_POSITIONS = 256  # of one image; neighbours say nearly the same, and the time goes with their number


def has_columns(operation: Operation) -> bool:
    """Return whether `columns` knows an operation: linear, and convolutions of one and two dimensions."""
    if isinstance(operation, PaddedProducts):
        operation = operation.products
    if isinstance(operation, ConvolutionProducts):
        return not operation.transposed and len(operation.stride) <= 2
    return isinstance(operation, LinearProducts)


def columns(operation: Operation, x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the columns that the rows of a weight are multiplied with, at evenly spaced positions.

    Args:
        operation: The bare products, of which `has_columns` is true.
        x: Input of the layer.
        shape: Of its weight, `(R_all, K, ...)`.

    Returns:
        Shape `(G, K, P)`: groups, inputs of an output, positions of all images.

    Example:
        >>> x = torch.arange(8.0).reshape(2, 4)
        >>> columns(LinearProducts(), x, (3, 4)).shape
        torch.Size([1, 4, 2])
    """
    if isinstance(operation, PaddedProducts):
        x, operation = operation.pad(x), operation.products
    if isinstance(operation, LinearProducts):
        rows = x.reshape(-1, x.shape[-1])
        per_image = max(1, rows.shape[0] // x.shape[0]) if x.dim() > 1 else 1
        return rows[:: max(1, per_image // MOST_POSITIONS)].t()[None]
    assert isinstance(operation, ConvolutionProducts)
    stride, padding, dilation = (_pair(v, fill) for v, fill in _geometry(operation))
    kernel = _pair(tuple(shape[2:]), 1)
    x = x if x.dim() == len(operation.stride) + 2 else x[None]
    x = x.unsqueeze(2) if len(operation.stride) == 1 else x
    outputs = 1
    for size, k, s, p, d in zip(x.shape[2:], kernel, stride, padding, dilation, strict=True):
        outputs *= max(1, (size + 2 * p - d * (k - 1) - 1) // s + 1)
    thin = max(1, math.ceil(math.sqrt(outputs / MOST_POSITIONS)))
    sparse = _pair(tuple(min(s * thin, max(s, n)) for s, n in zip(stride, x.shape[2:], strict=True)), 1)
    patches = F.unfold(x, kernel, dilation=dilation, padding=padding, stride=sparse)  # (N, C_in * kernel, L)
    groups = operation.groups
    n, _, positions = patches.shape
    return patches.reshape(n, groups, -1, positions).permute(1, 2, 0, 3).reshape(groups, -1, n * positions)


def second_moments(columns: Tensor) -> Tensor:
    """Return `X X^T` by group, in float32 or wider."""
    wide = columns.float() if columns.dtype in (torch.float16, torch.bfloat16) else columns
    return wide @ wide.mT


def _geometry(operation: ConvolutionProducts) -> tuple[tuple[tuple[int, ...], int], ...]:
    return (operation.stride, 1), (operation.padding, 0), (operation.dilation, 1)


def _pair(values: tuple[int, ...], fill: int) -> tuple[int, int]:
    return (values[0], values[1]) if len(values) == 2 else (fill, values[0])
