"""A frozen weight's integer-valued operand, kept in memory: 4 bytes a weight beside the 1 of its code.

It is no buffer: it stands in no state dict and no file. What it was computed from is known - the very tensor of codes,
where it lies, and torch's counter of writes into it - so it is computed again after any of them has changed.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from daqconvert.functional.inference import decoded_weight


class OperandCache:
    """Holds the operand of one tensor of codes.

    Attributes:
        kept: The codes, what was known of them, and their operand; None until it is computed. Replaced as a whole, so
            that threads may share it.

    Example:
        >>> cache, codes = OperandCache(), torch.tensor([0, 3], dtype=torch.uint8)
        >>> cache.get(codes, 2, "midrise", torch.float32).tolist()
        [-3.0, 3.0]
        >>> codes[0] = 1
        >>> cache.get(codes, 2, "midrise", torch.float32).tolist()
        [-1.0, 3.0]
    """

    def __init__(self) -> None:
        self.kept: tuple[Tensor, tuple[object, ...], Tensor] | None = None

    def get(self, codes: Tensor, bits: int, grid: str, dtype: torch.dtype) -> Tensor:
        """Return the operand of these codes, computed if it is not that of their present values.

        A compiled model takes what is here, for it cannot ask for the counter of writes; who traces it or watches its
        operators has to see where the operand comes from.

        Args:
            codes: uint8.
            bits: 1 to 8.
            grid: `"midrise"`, `"integer"` or `"twos"`.
            dtype: Of the operand.
        """
        kept = self.kept
        if torch.compiler.is_compiling():
            known = kept is not None and not torch.compiler.is_exporting()
            return kept[2] if known and kept is not None else decoded_weight(codes, bits, grid, dtype)
        if torch._C._get_tracing_state() is not None or torch._C._len_torch_dispatch_stack():
            return decoded_weight(codes, bits, grid, dtype)
        state = _state_of(codes, dtype)
        if kept is None or kept[0] is not codes or kept[1] != state:
            with torch.no_grad():
                kept = codes, state, decoded_weight(codes, bits, grid, dtype)
            self.kept = kept
        return kept[2]

    @property
    def nbytes(self) -> int:
        """Bytes of the operand."""
        return 0 if self.kept is None else self.kept[2].nbytes

    def __deepcopy__(self, memo: dict[int, Any]) -> OperandCache:
        replica = OperandCache()
        memo[id(self)] = replica
        if self.kept is not None and self.kept[1] == _state_of(self.kept[0], self.kept[2].dtype):
            codes, operand = copy.deepcopy(self.kept[0], memo), copy.deepcopy(self.kept[2], memo)
            replica.kept = codes, _state_of(codes, operand.dtype), operand
        return replica

    def __reduce__(self) -> Any:
        return OperandCache, ()  # a file holds the codes; the operand is computed again


def _state_of(codes: Tensor, dtype: torch.dtype) -> tuple[object, ...]:
    """What changes with the values of a tensor of codes, or with the operand that is asked for."""
    version = None if codes.is_inference() else codes._version
    return codes.data_ptr(), codes.stride(), codes.device, version, dtype
