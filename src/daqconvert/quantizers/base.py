"""What both quantizers share: the `calibrated` flag as a buffer, mirrored in Python so that forward never syncs."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from daqconvert.errors import CalibrationError
from daqconvert.functional.grid import Rounding

_GLOBAL_HOOKS = tuple(
    f"_global_{kind}_hooks" for kind in ("forward", "forward_pre", "backward", "backward_pre")
)  # of torch.nn.modules.module


def is_watched(module: nn.Module) -> bool:
    """Whether a call of a module does more than its `forward`: it has hooks, or all modules have."""
    own = module.__dict__
    hooks = own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    return bool(hooks) or any(getattr(torch_module, name) for name in _GLOBAL_HOOKS)


def widen_scalars(module: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
    """Give scalars that an earlier version saved the shape `(1,)` that a module's own tensors have now, in place.

    FSDP2 splits parameters along their first dimension, so parameters of one number are no scalars any more.

    Example:
        >>> module, state = nn.Module(), {"a.upper": torch.tensor(3.0)}
        >>> module.upper = nn.Parameter(torch.ones(1))
        >>> widen_scalars(module, state, "a."); state["a.upper"].shape
        torch.Size([1])
    """
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        saved = state_dict.get(prefix + name)
        if tensor is not None and tensor.shape == (1,) and isinstance(saved, Tensor) and saved.dim() == 0:
            state_dict[prefix + name] = saved.reshape(1)


class Quantizer(nn.Module):
    """Base of the quantizers: bounds, a `calibrated` buffer, and the name of the layer for messages.

    Attributes:
        layer_name: Dotted name of the layer, for error messages.
        calibrated: Bool buffer, saved with the bounds.
        ready: `calibrated` as a Python bool, which forward reads without waiting for a device.
        slope: `c` and `a` of the rounding as a tensor, for compiled models: if they were Python numbers, every change
            would compile the model anew.
    """

    calibrated: Tensor
    by_mean: ClassVar[bool] = False  # whether `calibrate` starts from the mean absolute value
    lower: Tensor
    upper: Tensor
    slope: Tensor
    own_forward: ClassVar[Any] = None  # the class's `forward`: `is_plain` asks whether it is still the one that runs
    _role = ""  # "input" or "weight", for error messages

    def __init__(self, layer_name: str) -> None:
        super().__init__()
        self.layer_name = layer_name
        self.ready = False
        self.register_buffer("calibrated", torch.tensor(False))

    @property
    def rounding(self) -> Rounding:
        """The gradient of the rounding, which may change between two training steps."""
        return self._rounding

    @rounding.setter
    def rounding(self, rounding: Rounding) -> None:
        numbers = torch.tensor((rounding.c, rounding.a), dtype=torch.float64, device="cpu")
        if "slope" in self.__dict__:
            self.slope.copy_(numbers)  # the same tensor, which compiled code holds
        else:
            self.slope = numbers
        self._rounding = rounding

    def plain_rounding(self) -> Rounding:
        """Return the rounding for plain operations; for a compiler its constants are tensors, else Python numbers."""
        if not torch.compiler.is_compiling() or torch.compiler.is_exporting():
            return self._rounding
        return Rounding(self._rounding.kind, self.slope[0], self.slope[1])  # type: ignore[arg-type]

    def is_plain(self) -> bool:
        """Whether a call runs the class's own `forward` and no hook: a layer may then quantize in its own operator."""
        own = type(self).forward is type(self).own_forward and "forward" not in self.__dict__
        return own and not is_watched(self)

    def mark(self, calibrated: bool) -> None:
        """Set the `calibrated` flag."""
        self.ready = calibrated
        self.calibrated.fill_(calibrated)

    def require_ready(self) -> None:
        """Raise `CalibrationError` if the bounds were never set."""
        if not self.ready:
            raise CalibrationError(
                f"{self.layer_name or '(root)'}: the bounds of its {self._role} quantizer were never set. "
                "Run daqconvert.calibrate(model, batches) first (finetune does so by itself)."
            )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        widen_scalars(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)
        flag = state_dict.get(prefix + "calibrated")
        if flag is not None and not flag.is_meta:
            self.ready = bool(flag)
