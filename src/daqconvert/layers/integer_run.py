"""The forward of a frozen layer in integer deployment: exact sums, then the codes of its output."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from daqconvert.functional.integer import IntegerLayer, requantized
from daqconvert.functional.products import PaddedProducts
from daqconvert.layers.site import Operation

BUFFERS = ("w_scale", "w_factor", "bias_codes", "y_scale", "y_zero_point", "y_range")
"""Where a site keeps the numbers of its `IntegerLayer`, in that order."""

EXACT = 2**24
"""From here on not every integer is a float32."""


def numbers_of(site: Any) -> IntegerLayer:
    """Return the numbers of a frozen site of integer deployment.

    Args:
        site: The site.
    """
    return IntegerLayer(*(site._buffers[key] for key in BUFFERS))


def integer_output(site: Any, operation: Operation, operand: Tensor, weight: Tensor) -> Tensor:
    """Return a layer's output on its grid, `(code - zero_point) * scale`.

    Args:
        site: Of integer deployment.
        operation: The bare products.
        operand: Of the input, integer-valued.
        weight: Operand of the weight, integer-valued.
    """
    numbers = numbers_of(site)
    if isinstance(operation, PaddedProducts):
        operand, operation = operation.pad(operand), operation.products
    if site.qdq:
        found: Tensor = torch.ops.daqconvert.requantize(
            operation(operand, weight), site.input_scale, *numbers, site.output_dims, site.layer_name
        )
        return found
    products = int32_products if _REFERENCE else exact_products
    sums = products(operation, operand, weight, site)
    return requantized(sums, numbers, site.input_scale, site.output_dims).to(operand.dtype)


def exact_products(operation: Operation, x: Tensor, w: Tensor, site: Any) -> Tensor:
    """Return `operation(x, w)` exactly: in float32 below 2**24, in parts of the channels or in float64 above.

    Args:
        operation: The bare products.
        x: Integer-valued operand of the input.
        w: Integer-valued operand of the weight.
        site: Whose bits say how large a sum may be.
    """
    x, w = x.float(), w.float()
    if torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return operation(x, w)
    largest = _largest_sum(site, w)
    if largest < EXACT:
        return operation(x, w)
    channels, parts = w.shape[1] if w.dim() > 1 else 0, -(-largest // (EXACT - 1))
    channel_of_x = -1 if w.dim() == 2 else 1
    if channels < parts or x.shape[channel_of_x] != channels:
        return operation(x.double(), w.double())
    pieces = zip(x.chunk(parts + 1, channel_of_x), w.chunk(parts + 1, 1), strict=True)
    total: Tensor | None = None
    for piece_x, piece_w in pieces:
        part = operation(piece_x, piece_w).to(torch.int32)
        total = part if total is None else total + part
    assert total is not None
    return total


def int32_products(operation: Operation, x: Tensor, w: Tensor, site: Any) -> Tensor:
    """Return `operation(x, w)` computed in int32, in int64 where torch has no such kernel (dilated convolutions).

    Args:
        operation: The bare products.
        x: Integer-valued operand of the input.
        w: Integer-valued operand of the weight.
        site: Not used.
    """
    try:
        return operation(x.to(torch.int32), w.to(torch.int32))
    except (NotImplementedError, RuntimeError):
        return operation(x.to(torch.int64), w.to(torch.int64))


def _largest_sum(site: Any, w: Tensor) -> int:
    """The largest sum that these weights can make of any input: remembered, for the codes of a frozen site stay."""
    known = site.__dict__.get("_largest_sum")
    codes = site._buffers["weight_codes"]
    version = (id(codes), codes._version)
    if known is None or known[0] != version:
        top = 2 ** (site.settings.a_bits or 0) - 1
        largest = int(w.abs().reshape(w.shape[0], -1).sum(1).max()) * top if w.numel() else 0
        known = site.__dict__["_largest_sum"] = (version, largest)
    return int(known[1])


_REFERENCE = False


@contextmanager
def int32_reference() -> Iterator[None]:
    """Compute every layer of integer deployment in int32 while the context lasts: slow, and beyond doubt."""
    global _REFERENCE
    before, _REFERENCE = _REFERENCE, True
    try:
        yield
    finally:
        _REFERENCE = before
