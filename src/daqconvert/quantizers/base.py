"""What both quantizers share: the buffer `calibrated`, which says whether bounds were set and for which form.

The buffer is 0 while the bounds were never set, else the number of the quantizer's form (bits, grid, granularity): a
state dict of another form is refused, and so are values that were copied from a quantizer of another form. Earlier
versions saved a bool, which says nothing of the form and is loaded.

It is a float, because averages of weights subtract and interpolate everything that they average. An average that began
before `calibrate` mixes the bounds that were set with those of the start; `calibrated / form` is then the share of the
former, from which the average of the set bounds follows (`_settle_average`).

Python keeps copies of the flags, and these follow the buffers however they are written: by `load_state_dict`, by the
`copy_` of an average, by a loop of one's own. On the CPU a flag is read whenever it is asked for. On an accelerator
reading waits for the device; there it is read while the bounds count as never set, and when torch's counter of writes
has moved and the quantizer is in evaluation mode (in training mode DDP writes all buffers in every step).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from daqconvert.errors import CalibrationError, ConversionError, first_few
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
        calibrated: float32 buffer of shape `()`, saved with the bounds: 0 while they were never set, else `form`.
        recovers: Whether an average of weights that began before `calibrate` can be used.
        slope: `c` and `a` of the rounding as a tensor, for compiled models: if they were Python numbers, every change
            would compile the model anew.
    """

    calibrated: Tensor
    bits: int
    recovers: bool = True
    forms: ClassVar[int] = 8  # how many there are
    by_mean: ClassVar[bool] = False  # whether `calibrate` starts from the mean absolute value
    lower: Tensor
    upper: Tensor
    slope: Tensor
    own_forward: ClassVar[Any] = None  # the class's `forward`: `is_plain` asks whether it is still the one that runs
    _role = ""  # "input" or "weight", for error messages

    def __init__(self, layer_name: str) -> None:
        super().__init__()
        self.layer_name = layer_name
        self._ready = False
        self._start: dict[str, Tensor] | None = None  # bounds that were put aside by `mark(False)`
        self.register_buffer("calibrated", torch.tensor(0.0))

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

    @property
    def ready(self) -> bool:
        """Whether the bounds have been set: the buffer `calibrated` as a Python bool."""
        self._follow()
        return self._ready

    @property
    def form(self) -> int:
        """The number of what the bounds are the bounds of, above `FORMS`; `form_text` says it in words."""
        return FORMS + self.bits

    def _is_form(self, value: float) -> bool:
        return FORMS < value <= FORMS + self.forms and value.is_integer()

    def form_text(self, form: int) -> str:
        """Return in words what bounds of a form are the bounds of, such as `a_bits = 4`."""
        bits, tied = (form - FORMS - 1) % 8 + 1, form - FORMS > 8
        return f"{'w_bits' if self._role == 'weight' else 'a_bits'} = {bits}{', symmetric' if tied else ''}"

    def mark(self, calibrated: bool) -> None:
        """Set the `calibrated` flag."""
        if not calibrated:
            self._start = {
                name: bound.detach().clone() for name, bound in self._parameters.items() if bound is not None
            }
        self._ready = calibrated
        self.calibrated.fill_(float(self.form) if calibrated else 0.0)

    def misfit(self, state_dict: Mapping[str, Any], prefix: str) -> str:
        """Return why the entries of a state dict at `prefix` are no bounds for this quantizer; empty if they are."""
        saved = state_dict.get(prefix + "calibrated")
        if not isinstance(saved, Tensor) or saved.is_meta or not saved.is_floating_point():
            return ""
        form = float(saved)
        if form == self.form or not self._is_form(form):  # if it is no form: never set, or an average
            return ""
        form = int(form)
        return f"{self.layer_name or '(root)'}: {self.form_text(form)} there, {self.form_text(self.form)} here"

    @torch.compiler.disable
    def _ready_now(self) -> bool:
        """Return `ready` outside the graph of a compiler, which would take the copy of the flag for a constant."""
        return self.ready

    def _follow(self) -> None:
        """Bring the copies of the flags in Python in line with the buffers, where these can be read now."""
        flag = self._buffers["calibrated"]
        if flag is None or torch.compiler.is_compiling() or not _is_readable(flag):
            return
        if flag.device.type != "cpu" and self._ready:
            now, known = (flag, None if flag.is_inference() else flag._version), self.__dict__.get("_seen")
            if known is not None and (self.training or (known[0] is flag and known[1] == now[1])):
                return
            self._seen = now
        self._read_flags(float(flag))

    def _read_flags(self, value: float) -> None:
        """Set the copies of the flags; `value` is that of `calibrated`."""
        other = value != self.form and self._is_form(value)
        self._ready = not other and value >= self.form * (1.0 - NEAR)
        if not (self._ready or other) and value > 0.0 and self.recovers:
            self._settle_average(value / self.form)

    @torch.no_grad()
    def _settle_average(self, share: float) -> None:
        """Make the bounds of an average that began before `calibrate` the average of the bounds that were set.

        Such a bound is `(1 - share) * start + share * set`, and so is the flag, with `start = 0` and `set = form`.
        """
        for name, bound in self._parameters.items():
            if bound is not None:
                start = self._start_of(name, bound).double()
                bound.copy_(start + (bound.double() - start) / share)
        self.mark(True)

    def _start_of(self, name: str, bound: Tensor) -> Tensor:
        """Return what a bound was while it was not set: what `mark(False)` found, or what the quantizer began with."""
        if self._start is not None and name in self._start:
            return self._start[name].to(bound.device)
        return torch.zeros_like(bound) if name == "lower" else torch.ones_like(bound)

    def require_ready(self) -> None:
        """Raise `CalibrationError` if the bounds were never set."""
        if not self.ready and not (torch.compiler.is_compiling() and self._ready_now()):
            value = 0.0 if torch.compiler.is_compiling() or self.calibrated.is_meta else float(self.calibrated)
            where = f"{self.layer_name or '(root)'}: the bounds of its {self._role} quantizer"
            if value == 0.0:
                raise CalibrationError(
                    f"{where} were never set. "
                    "Run daqconvert.calibrate(model, batches) first (finetune does so by itself)."
                )
            raise CalibrationError(
                f"{where} were written by an average of weights that began before calibrate, or from a model of other "
                "bits. Make the average after calibrate, or load the calibrated model into it once: "
                "average.module.load_state_dict(qmodel.state_dict())."
            )

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        problem = self.misfit(state_dict, prefix)
        if problem:  # reached where a part of a model is loaded; a whole model is checked before anything is loaded
            raise ConversionError(other_form([problem]))
        widen_scalars(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)
        flag = self.calibrated
        if prefix + "calibrated" not in state_dict or flag.is_meta:
            return
        if not flag.is_floating_point():
            self.calibrated = flag.float()  # `assign=True` with what an earlier version saved
        if float(flag) == 1.0:
            self.calibrated.fill_(float(self.form))  # saved by an earlier version: the form is not known
        self._read_flags(float(self.calibrated))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a pickled quantizer, also one of an earlier version."""
        if "ready" in state:
            state = {"_ready": state["ready"], "_start": None} | {k: v for k, v in state.items() if k != "ready"}
        super().__setstate__(state)
        if self.calibrated.dtype == torch.bool:
            self.calibrated = self.calibrated.float() * self.form


FORMS = 100  # forms are numbers from 101 to 196: few averages pass through one, and bfloat16 holds them exactly
NEAR = 2e-3  # relative; how far rounding may take the flag of an average from the flag that it is the average of


def other_form(problems: list[str]) -> str:
    """Return the message about a state dict whose bounds are of another form; `problems` are from `misfit`."""
    return (
        "load_state_dict: the state dict is of a model that was quantized otherwise: "
        f"{first_few(problems)}. Nothing was loaded. Quantize the float model as it was then, "
        "daqconvert.quantize(model, w_bits=..., a_bits=..., bits=...), and load the state dict into that. To take its "
        "weights alone: daqconvert.load_float(qmodel, {k: v for k, v in state.items() if '_quantizer.' not in k and "
        "not k.endswith('output_scale')}), then calibrate."
    )


def _is_readable(flag: Tensor) -> bool:
    """Whether a flag has a value that Python may read now: not on `meta`, in a trace, nor inside `torch.func`."""
    return not (
        flag.is_meta
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._functorch.is_functorch_wrapped_tensor(flag)
    )
