"""The codes of a weight, kept until the weight or its bounds hold other values.

What tells is a 64-bit fingerprint of the values themselves, read at every call at the speed of memory: an optimizer's
step, `load_state_dict`, a write through `.data` or through NumPy, a swap with an average, another module's weight. A
version counter would miss some of them. Without the compiled kernels there is no cheap fingerprint: nothing is kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from daqconvert.functional.native import address, dense, kernels


@dataclass(frozen=True)
class KnownWeight:
    """What was computed from one weight; never changed, so that threads may share it.

    Attributes:
        key: From `value_key`.
        codes: uint8.
        mean: Where the weight is normalized.
        std: Likewise.
    """

    key: tuple[object, ...]
    codes: Tensor
    mean: Tensor | None
    std: Tensor | None


def value_key(weight: Tensor, lower: Tensor | None, upper: Tensor) -> tuple[object, ...] | None:
    """Return what stands for the values of a weight and its bounds, or None where it cannot be told cheaply.

    Args:
        weight: Any shape.
        lower: None where it follows from `upper`.
        upper: `(C_out,)` or scalar.

    Example:
        >>> weight, bound = torch.ones(3), torch.ones(())
        >>> before = value_key(weight, None, bound)
        >>> weight.data.mul_(2.0).sum().item(), before is None or value_key(weight, None, bound) != before
        (6.0, True)
    """
    library = kernels(weight, lower, upper)
    if library is None or not upper.is_contiguous() or (lower is not None and not lower.is_contiguous()):
        return None
    found = library.daq_fingerprint(
        dense(weight).data_ptr(), weight.numel(), address(lower), upper.data_ptr(), upper.numel(),
        torch.get_num_threads(),
    )  # fmt: skip
    return weight.shape, weight.stride(), found


def savable(t: Tensor) -> Tensor:
    """Return a tensor that a backward may keep: a copy of one that was made in inference mode."""
    if not t.is_inference():
        return t
    with torch.inference_mode(False):
        return t.clone()
