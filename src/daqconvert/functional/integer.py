"""The arithmetic of integer deployment, in which a frozen model, its reference and an integer runtime agree.

One layer has input codes `x` of scale `sx` and zero point `zx`, integer weights `w` (`|w| <= 127`) of scale `sw` per
output channel, and an output of scale `sy` and zero point `zy`:

    acc = sum((x - zx) * w) + bias                      int32;  bias = round(b / (sx * sw)), b the float bias
    y   = clip(round(float32(acc) * m) + zy, low, high)         m = float32(float32(sx * sw) / sy)

`round` is half to even; each product, quotient and conversion is rounded to float32 by itself, in a model of any
dtype: the numbers of a layer are float32 and integers. `low` and `high` include the limits of an activation that
clips. Stored weights are the layer's operands times `factor`, which is `127 // n`: that refines the unit of the bias
at no cost. It is negative where the channel's scale is negative (a batch norm with negative gamma), and 0 where the
scale is 0 or so small that the bias would not fit; the output of such a channel is its bias.

Between layers, values are `(code - zero point) * scale` in float32. A sum of two such values that is rounded to a
third grid needs care. The frozen model computes `round((a * sa + b * sb) / sy)` in float32, operation by operation.
ONNX Runtime's integer kernel for sums multiplies by `sa / sy` and `sb / sy` instead, with fused multiply-adds where
the processor has them. For most scales all three ways give equal codes for all 65,536 pairs of codes; where they do
not, `agreeing_scale` finds a scale close to the one asked for, for which they do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from daqconvert.functional.native import kernels, only_values
from daqconvert.functional.products import memory_sizes

LARGEST_WEIGHT = 127
LARGEST_BIAS = 2**30
"""Largest size of a bias: sums of products and bias stay in int32."""


class IntegerLayer(NamedTuple):
    """The numbers of one layer.

    Attributes:
        weight_scale: float32, `(C_out,)`, positive: real units per unit of the stored weight.
        factor: int8, `(C_out,)`: stored weight / operand.
        bias: int32, `(C_out,)`.
        scale: float32 scalar: scale of the output.
        zero_point: uint8 scalar: zero point of the output.
        range: uint8, `(2,)`: smallest and largest code of the output.
    """

    weight_scale: Tensor
    factor: Tensor
    bias: Tensor
    scale: Tensor
    zero_point: Tensor
    range: Tensor

    def sum_scale(self, x_scale: Tensor) -> Tensor:
        """Return the real units per integer sum, which are those of the bias: `sx * sw`, rounded to float32."""
        return x_scale.float() * self.weight_scale

    def multiplier(self, x_scale: Tensor) -> Tensor:
        """Return `m`, the codes of the output per integer sum."""
        return self.sum_scale(x_scale) / self.scale


def integer_layer(
    scale: Tensor, bias: Tensor, top: int, x_scale: Tensor, y_scale: Tensor, y_zero_point: Tensor, bits: int,
    lower: float | None, upper: float | None,
) -> IntegerLayer:  # fmt: skip
    """Return the numbers of a layer whose input has the scale `x_scale` and whose output is quantized to `bits`.

    `scale` and `bias`, float64 of `(C_out,)`, are the layer's sum scale and bias with a batch norm folded in; `top` is
    the largest size of an operand of the weight. The scales of input and output are scalars, taken as float32, the
    output's zero point is uint8. `lower` and `upper` are the bounds, in real units, of the activation that follows;
    None for none.

    Example:
        >>> one, half = torch.ones(2, dtype=torch.float64), torch.tensor(0.5)
        >>> numbers = integer_layer(one * 0.25, one, 7, half, half, torch.tensor(0, dtype=torch.uint8), 8, 0.0, None)
        >>> numbers.factor.tolist(), numbers.bias.tolist(), numbers.range.tolist()
        ([18, 18], [72, 72], [0, 255])
    """
    k, x_scale, y_scale = LARGEST_WEIGHT // top, x_scale.float(), y_scale.float()
    weight_scale = (scale.abs() / (x_scale.double() * k)).float()
    unit = (x_scale * weight_scale).double()  # float32 product: what the runtime multiplies by
    dead = ~(unit.isfinite() & (unit >= torch.finfo(torch.float32).tiny) & (bias.abs() <= unit * LARGEST_BIAS))
    weight_scale = torch.where(dead, y_scale / x_scale, weight_scale)
    unit = (x_scale * weight_scale).double()
    factor = torch.where(dead, 0, torch.where(scale < 0, -k, k)).to(torch.int8)
    codes = (bias / unit).round().clamp(-LARGEST_BIAS, LARGEST_BIAS).to(torch.int32)
    ends = [0, 2**bits - 1]
    for at, bound in enumerate((lower, upper)):
        if bound is not None:
            ends[at] = min(max(code_of(bound, float(y_scale), int(y_zero_point)), ends[0]), ends[1])
    limits = torch.tensor(ends, dtype=torch.uint8, device=scale.device)
    return IntegerLayer(weight_scale, factor, codes, y_scale.clone(), y_zero_point.clone(), limits)


def code_of(value: float, scale: float, zero_point: int) -> int:
    """Return the code of a real value, not clipped to the codes of a grid.

    Example:
        >>> code_of(6.0, 0.5, 3), code_of(-6.0, 0.5, 3)
        (15, -9)
    """
    return round(value / scale) + zero_point


def requantize(acc: Tensor, layer: IntegerLayer, x_scale: Tensor, output_dims: int) -> Tensor:
    """Return the codes of a layer's output minus their zero point, integer-valued, in float32.

    `acc` are its sums of products, exact integers in any dtype; `output_dims` dimensions follow the channel. Where a
    sum is NaN, because an input was, so is the output.
    """
    shape = (-1, *(1,) * output_dims)
    m = layer.multiplier(x_scale)
    sums = acc.to(torch.int32) * layer.factor.to(torch.int32).reshape(shape) + layer.bias.reshape(shape)
    zero = layer.zero_point.float()
    low, high = layer.range.float().unbind()
    codes = torch.clamp(torch.round(sums.float() * m.reshape(shape)), low - zero, high - zero)
    return torch.where(acc.isnan(), torch.nan, codes) if acc.is_floating_point() else codes


def output_values(acc: Tensor, layer: IntegerLayer, x_scale: Tensor, output_dims: int) -> Tensor:
    """Return a layer's output in real units, `requantize` times the scale of the output.

    Nobody else may hold the sums `acc`: where the kernels run, they write the output into that memory, in one pass.
    """
    library = kernels(acc, layer.weight_scale, x_scale) if only_values(acc) and acc.dtype == torch.float32 else None
    sizes = None if library is None else memory_sizes(acc, output_dims)
    if library is None or sizes is None:
        return requantize(acc, layer, x_scale, output_dims) * layer.scale
    m = layer.multiplier(x_scale)
    factor, bias, zero = layer.factor.to(torch.int32), layer.bias.contiguous(), int(layer.zero_point)
    low, high = layer.range.tolist()
    library.daq_requantize(
        acc.data_ptr(), acc.data_ptr(), *sizes, factor.data_ptr(), bias.data_ptr(), m.data_ptr(), low - zero,
        high - zero, layer.scale.item(), torch.get_num_threads(),
    )  # fmt: skip
    return acc


EXACT = 2**24
"""From here on not every integer is a float32."""

_IN_INT32 = False


def exact_sums(products: Callable[[Tensor, Tensor], Tensor], x: Tensor, w: Tensor, largest: int | None) -> Tensor:
    """Return `products(x, w)` of integer-valued operands, every sum exact, as float32, float64 or int32.

    `largest` is the largest size that a sum can have. Up to 2**24 float32 is exact; above, parts of the channels are
    summed in float32 and added in int32, or all is summed in float64 where the channels cannot be split. With None,
    all is summed in float32 without a check.
    """
    if _IN_INT32:
        return _int32_sums(products, x, w)
    x, w = x.float(), w.float()
    if largest is None or largest < EXACT:
        return products(x, w)
    channels, parts = w.shape[1] if w.dim() > 1 else 0, -(-largest // (EXACT - 1))
    channel_of_x = -1 if w.dim() == 2 else 1
    if channels < parts or x.shape[channel_of_x] != channels:
        return products(x.double(), w.double())
    pieces = zip(x.chunk(parts + 1, channel_of_x), w.chunk(parts + 1, 1), strict=True)
    sums: Tensor | None = None
    undefined: Tensor | None = None  # NaN, which no integer can hold
    for piece_x, piece_w in pieces:
        part = products(piece_x, piece_w)
        undefined = part.isnan() if undefined is None else undefined | part.isnan()
        sums = part.to(torch.int32) if sums is None else sums + part.to(torch.int32)
    assert sums is not None and undefined is not None
    return sums.double().masked_fill(undefined, torch.nan) if undefined.any() else sums


@contextmanager
def int32_reference() -> Iterator[None]:
    """Compute all sums of integer deployment in int32 while the context lasts: slow, but certainly exact."""
    global _IN_INT32
    before, _IN_INT32 = _IN_INT32, True
    try:
        yield
    finally:
        _IN_INT32 = before


def _int32_sums(products: Callable[[Tensor, Tensor], Tensor], x: Tensor, w: Tensor) -> Tensor:
    """Sum in int32, or in int64 where torch has no kernel for int32 (dilated convolutions)."""
    try:
        return products(x.to(torch.int32), w.to(torch.int32))
    except (NotImplementedError, RuntimeError):
        return products(x.to(torch.int64), w.to(torch.int64))


TRIES, APART = 200, 2.0**-21
"""How many scales `agreeing_scale` tries, and their relative distance: 1e-4 in all, a fortieth of a code at 8 bits."""


class CodeGrid(NamedTuple):
    """A grid of codes `0 .. 255`: float32 scale and integer zero point."""

    scale: float
    zero_point: int


def sums_agree(a: CodeGrid, b: CodeGrid, y: CodeGrid) -> bool:
    """Whether every way to compute the sum of values on the grids `a` and `b`, rounded to `y`, gives the same codes.

    Example:
        >>> sums_agree(CodeGrid(0.5, 0), CodeGrid(0.25, 128), CodeGrid(0.5, 0))
        True
    """
    codes = torch.arange(256, dtype=torch.float32)
    x, z = codes[:, None], codes[None, :]
    sa, sb, sy = (torch.tensor(grid.scale, dtype=torch.float32) for grid in (a, b, y))
    za, zb, zy = (torch.tensor(float(grid.zero_point)) for grid in (a, b, y))
    wanted = torch.round(((x - za) * sa + (z - zb) * sb) / sy).clamp(-zy, 255 - zy)
    ra, rb = sa / sy, sb / sy
    fixed = zy - _fma(ra, za, rb * zb)
    fused = torch.round(_fma(x, ra, _fma(z, rb, fixed)))
    plain = torch.round(x * ra + (z * rb + (zy - (ra * za + rb * zb))))
    return all(torch.equal(found.clamp(0, 255) - zy, wanted) for found in (fused, plain))


def _fma(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Return `x * y + z`, rounded once: the product of two float32 is exact in float64."""
    return (x.double() * y.double() + z.double()).float()


def agreeing_scale(a: CodeGrid, b: CodeGrid, y: CodeGrid) -> float:
    """Return the scale of `y` if `sums_agree`, else the next larger one that agrees, or that of `y` if none does."""
    for k in range(TRIES):
        scale = float(torch.tensor(y.scale * (1.0 + k * APART), dtype=torch.float32))
        if sums_agree(a, b, CodeGrid(scale, y.zero_point)):
            return scale
    return y.scale
