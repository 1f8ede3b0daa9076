"""The arithmetic of a frozen site, one pass over memory each: no gradient, no codes, nothing kept.

    operand = clip(round(x / scale), -zero_point, n - zero_point)     of an input
    operand = codes * step + offset                                   of a weight

The compiled kernels compute where nothing but values is asked for: outside of tracing and compiling, which have to see
plain operations, outside of `torch.func`, and where no gradient is wanted. Plain torch gives the same values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from daqconvert.functional.codes import WeightCodes, expand_weight
from daqconvert.functional.dasr import round_half_even
from daqconvert.functional.grid import coding, weight_operand
from daqconvert.functional.native import dense, kernels


def only_values(*tensors: Tensor | None) -> bool:
    """Whether nothing but the values of a result is asked for: no gradient, no trace, no transform of functions.

    Args:
        tensors: That the result is computed from; None is no tensor.

    Example:
        >>> only_values(torch.ones(1)), only_values(torch.ones(1, requires_grad=True))
        (True, False)
    """
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in tensors)


def input_operand(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Return `clip(round(x / scale), -zero_point, n - zero_point)`, integer-valued, in the dtype of `x`.

    Args:
        x: Any shape, any floating dtype; arithmetic in float32 at least.
        scale: Scalar, the step between two levels.
        zero_point: Scalar, uint8.
        bits: 1 to 8; `n = 2**bits - 1`.

    Example:
        >>> zero = torch.tensor(0, dtype=torch.uint8)
        >>> input_operand(torch.tensor([0.1, 0.9, 9.0]), torch.tensor(0.5), zero, 2).tolist()
        [0.0, 2.0, 3.0]
    """
    library = kernels(x, scale, zero_point) if only_values(x, scale) else None
    if library is None:
        wide = x if x.dtype == torch.float64 else x.float()
        low = zero_point.to(wide.dtype)
        # NOTE: operation by operation as in training: where a size of 1 leaves the layout open, the strides decide
        # which kernel the convolution and what follows it take, and two kernels may differ in the last bit
        return round_half_even(torch.clamp(wide / scale, -low, (2**bits - 1) - low)).to(x.dtype)
    x, zero = dense(x), zero_point.float()
    out = torch.empty_like(x)
    library.daq_quantize_input(
        x.data_ptr(), out.data_ptr(), None, x.numel(), scale.data_ptr(), zero.data_ptr(), 2**bits - 1,
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def decoded_weight(codes: Tensor, bits: int, grid: str, dtype: torch.dtype) -> Tensor:
    """Return the integer-valued operand of stored codes: `functional.grid.weight_operand` in one pass.

    Args:
        codes: uint8.
        bits: 1 to 8.
        grid: `"midrise"`, `"integer"` or `"twos"`.
        dtype: Of the result.

    Example:
        >>> decoded_weight(torch.tensor([0, 3], dtype=torch.uint8), 2, "midrise", torch.float32).tolist()
        [-3.0, 3.0]
    """
    if dtype != torch.float32 or not only_values(codes) or kernels(codes) is None:
        return weight_operand(codes, bits, grid, dtype)
    coded = WeightCodes(codes, *coding(bits, grid))
    return expand_weight(coded, (1, 1, 1, codes.numel()), None, dtype)
