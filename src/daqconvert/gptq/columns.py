"""Inputs of a layer as columns: what each output of it is a product of the weight's rows with."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from daqconvert.functional.products import ConvolutionProducts, LinearProducts, PaddedProducts
from daqconvert.layers.site import Operation

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
