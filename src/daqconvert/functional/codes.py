"""The codes of an operand: one byte an element, what a convolution keeps for its backward instead of the operand.

A quantizer returns its operand as a plain tensor with the codes as an attribute; `codes_of` finds them there, unless
the operand was changed in between. A tensor that a forward hook returned instead has no codes: it is kept itself.

A weight is seen as `(A, B, C, D)`, in this order in memory; its output channel is `a * C + c`
(`kernels/quantizer.cpp`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from daqconvert.functional.grid import coding, weight_operand
from daqconvert.functional.native import address, kernels, row_major, view_argument

View = tuple[int, int, int, int]
"""A weight's shape as `(A, B, C, D)`."""

_ATTRIBUTE = "_daqconvert_codes"


@dataclass(frozen=True)
class InputCodes:
    """Codes of an input; `operand = codes - zero_point`.

    Attributes:
        codes: uint8, shape and strides of the operand; empty where none were asked for.
        zero_point: Scalar.
        scale: Scalar, real units per code; carries the bounds' gradient.
    """

    codes: Tensor
    zero_point: Tensor
    scale: Tensor


@dataclass(frozen=True)
class WeightCodes:
    """Codes of a weight; `operand = codes * spacing + lowest` with the `functional.grid.coding` of its grid.

    Attributes:
        codes: uint8, shape and strides of the operand.
        bits: 1 to 8.
        grid: `"midrise"`, `"integer"` or `"twos"`.
    """

    codes: Tensor
    bits: int
    grid: str


def attach(operand: Tensor, codes: InputCodes | WeightCodes) -> Tensor:
    """Attach the codes to their operand as an attribute, and return the operand."""
    setattr(operand, _ATTRIBUTE, (codes, _version(operand)))
    return operand


def codes_of(operand: Tensor) -> InputCodes | WeightCodes | None:
    """Return the codes that a quantizer attached to its operand; None without any, or if it was changed since."""
    found = getattr(operand, _ATTRIBUTE, None)
    return found[0] if found is not None and found[1] == _version(operand) else None


def _version(operand: Tensor) -> int | None:
    """Torch's counter of writes; a tensor made in inference mode has none, and needs none: it has no backward."""
    return None if operand.is_inference() else operand._version


def pad_operand(pad: Callable[[Tensor], Tensor], operand: Tensor) -> Tensor:
    """Return the padded operand of an input with its codes; `pad` adds zeros or repeats elements."""
    padded, found = pad(operand), codes_of(operand)
    if not isinstance(found, InputCodes) or not found.codes.numel() or padded is operand:
        return padded
    with torch.no_grad():
        codes = (padded + found.zero_point).to(torch.uint8)
    return attach(padded, InputCodes(codes, found.zero_point, found.scale))


def expand_input(codes: Tensor, zero_point: Tensor) -> Tensor:
    """Return the operand of an input, in the dtype of `zero_point`.

    Example:
        >>> expand_input(torch.tensor([0, 3], dtype=torch.uint8), torch.tensor(1.0)).tolist()
        [-1.0, 2.0]
    """
    library = kernels(zero_point, codes)
    if library is None:
        return codes.to(zero_point.dtype) - zero_point
    out = torch.empty_like(codes, dtype=torch.float32)
    library.daq_expand_input(
        codes.data_ptr(), out.data_ptr(), codes.numel(), zero_point.data_ptr(), torch.get_num_threads()
    )
    return out


def expand_weight(codes: WeightCodes, view: View, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the operand of a weight in `dtype`, times the scale of its channel, one or `(A * C,)`, if there is one.

    Example:
        >>> codes = WeightCodes(torch.tensor([[0, 1], [2, 3]], dtype=torch.uint8), 2, "midrise")
        >>> expand_weight(codes, (1, 1, 2, 2), torch.tensor([1.0, 10.0]), torch.float32).tolist()
        [[-3.0, -1.0], [10.0, 30.0]]
    """
    stored = row_major(codes.codes, view)
    library = kernels(stored, scale) if dtype == torch.float32 else None
    if library is None:
        operand = weight_operand(stored, codes.bits, codes.grid, dtype)
        return operand if scale is None else scale_channels(operand, view, scale)
    out = torch.empty_like(stored, dtype=torch.float32)
    library.daq_expand_weight(
        stored.data_ptr(), out.data_ptr(), view_argument(view), *coding(codes.bits, codes.grid), address(scale),
        scale is not None and scale.numel() > 1, torch.get_num_threads(),
    )  # fmt: skip
    return out


def scale_channels(x: Tensor, view: View, scale: Tensor) -> Tensor:
    """Return `x`, of a weight's shape, times the scale of its channel, one or `(A * C,)`."""
    if scale.numel() == 1:
        return x * scale
    return (x.reshape(view) * scale.reshape(view[0], 1, view[2], 1)).reshape(x.shape)


def channel_sums(x: Tensor, view: View, scale: Tensor) -> Tensor:
    """Return the sums of `x` over the elements that share a scale, in the shape of `scale`."""
    whole = scale.numel() == 1 and view[0] * view[2] > 1  # one scale for many channels
    sums = x.sum() if whole or scale.dim() == 0 else x.reshape(view).sum(dim=(1, 3))
    return sums.reshape(scale.shape)
