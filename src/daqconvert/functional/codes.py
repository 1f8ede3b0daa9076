"""The codes of an operand: one byte an element, what a convolution keeps for its backward instead of the operand.

A quantizer returns its operand as a plain tensor and leaves the codes on it; `codes_of` finds them there unless
somebody changed the operand in between. What a forward hook returned instead has none, and is kept as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from daqconvert.functional.native import address, kernels, row_major, view_argument

View = tuple[int, int, int, int]
_ATTRIBUTE = "_daqconvert_codes"


@dataclass(frozen=True)
class InputCodes:
    """Codes of an input; `operand = codes - zero_point`.

    Attributes:
        codes: uint8, shape and strides of the operand; empty where none were asked for.
        zero_point: Scalar.
        scale: Scalar, what one step is worth; carries the bounds' gradient.
    """

    codes: Tensor
    zero_point: Tensor
    scale: Tensor


@dataclass(frozen=True)
class WeightCodes:
    """Codes of a weight; `operand = codes * step + offset`.

    Attributes:
        codes: uint8, shape and strides of the operand.
        step: 2 on the midrise grid, else 1.
        offset: The lowest operand.
    """

    codes: Tensor
    step: float
    offset: float


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


def expand_weight(coded: WeightCodes, view: View, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the operand of a weight, times the scale of its channel where one is given.

    Args:
        coded: The codes.
        view: `(A, B, C, D)`, the channel being `a * C + c`.
        scale: `()`, `(A * C,)` or None.
        dtype: Of the result.

    Example:
        >>> coded = WeightCodes(torch.tensor([[0, 1], [2, 3]], dtype=torch.uint8), 2.0, -3.0)
        >>> expand_weight(coded, (1, 1, 2, 2), torch.tensor([1.0, 10.0]), torch.float32).tolist()
        [[-3.0, -1.0], [10.0, 30.0]]
    """
    codes = row_major(coded.codes, view)
    library = kernels(codes, scale) if dtype == torch.float32 else None
    if library is None:
        operand = codes.to(dtype) * coded.step + coded.offset
        return operand if scale is None else scale_channels(operand, view, scale)
    out = torch.empty_like(codes, dtype=torch.float32)
    library.daq_expand_weight(
        codes.data_ptr(), out.data_ptr(), view_argument(view), coded.step, coded.offset, address(scale),
        scale is not None and scale.dim() > 0, torch.get_num_threads(),
    )  # fmt: skip
    return out


def scale_channels(x: Tensor, view: View, scale: Tensor) -> Tensor:
    """Return `x` times the scale of its channel.

    Args:
        x: A weight, or something of its shape.
        view: `(A, B, C, D)`.
        scale: `()` or `(A * C,)`.
    """
    if scale.dim() == 0:
        return x * scale
    return (x.reshape(view) * scale.reshape(view[0], 1, view[2], 1)).reshape(x.shape)


def channel_sums(x: Tensor, view: View, scale: Tensor) -> Tensor:
    """Return the sums of `x` over the elements that share a scale, in the shape of `scale`."""
    return x.sum() if scale.dim() == 0 else x.reshape(view).sum(dim=(1, 3)).reshape(scale.shape)


def pad_operand(pad: Callable[[Tensor], Tensor], operand: Tensor) -> Tensor:
    """Return a padded operand with its codes.

    Args:
        pad: Adds zeros, or repeats values.
        operand: Of an input.
    """
    padded, coded = pad(operand), codes_of(operand)
    if not isinstance(coded, InputCodes) or not coded.codes.numel() or padded is operand:
        return padded
    with torch.no_grad():
        codes = (padded + coded.zero_point).to(torch.uint8)
    return attach(padded, InputCodes(codes, coded.zero_point, coded.scale))


def attach(operand: Tensor, coded: InputCodes | WeightCodes) -> Tensor:
    """Leave the codes on their operand, and return it."""
    setattr(operand, _ATTRIBUTE, (coded, _version(operand)))
    return operand


def codes_of(operand: Tensor) -> InputCodes | WeightCodes | None:
    """Return the codes that a quantizer left on its operand; None where there are none, or it was changed since."""
    found = getattr(operand, _ATTRIBUTE, None)
    return found[0] if found is not None and found[1] == _version(operand) else None


def _version(operand: Tensor) -> int | None:
    return None if operand.is_inference() else operand._version  # what inference mode makes has none, and no backward
