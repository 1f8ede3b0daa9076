"""Two optimizers that step together: how they are made by name, stepped, and saved as flat tensors.

Names are those of timm's factory; an optimizer that needs more than gradients, or keeps anything but tensors and
numbers, is refused. `sgd` is plain SGD with momentum here, as in torch and in the published recipes. In timm, `sgd` is
Nesterov's variant; `nesterov` means that variant both here and in timm.

State is flat tensors by name, and is restored bit for bit. `SLOT/PARAMETER` is a tensor of one parameter's state, such
as `momentum_buffer/conv.weight`. A Python number is a scalar tensor whose slot says its type: `step:int/conv.weight`.
What an optimizer keeps once for a whole parameter group is `group.SLOT/INDEX`, such as `group.step/0`.
"""

from __future__ import annotations

import copy
import functools
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from daqconvert.errors import TrainingError, nearest
from daqconvert.posttraining import parameter_sizes, step_in_sizes
from daqconvert.training.checkpoint import COUNTS
from daqconvert.training.optim.groups import (
    QUANTIZERS,
    WEIGHTS,
    decay_groups,
    lr_factor,
    parameter_groups,
    undecayed,
)
from daqconvert.training.recipes import Recipe


class Optimizers:
    """One optimizer for the weights and one for the quantizers, stepped together; a group without parameters has none.

    Args:
        model: A quantized model.
        recipe: Recipe with both optimizers, their learning rates, momentum, weight decay and schedule.
        total_steps: Optimizer steps of the whole run, after which the schedule ends; 0 if unknown.

    Attributes:
        named: Parameters by group and name.
        optimizers: Optimizer of each group.
        total_steps: The argument of this name.
        resting: Groups that `step` leaves as they are; empty at first. They are not in the state: the part that
            put them here does so again when a run is resumed.

    Raises:
        TrainingError: If no parameter is trainable, an optimizer is unknown or cannot be used, a pattern of
            `no_decay` matches nothing, or the schedule has to know where it ends and the length is unknown.

    Example:
        >>> import daqconvert as dq
        >>> qmodel = dq.quantize(nn.Sequential(nn.Linear(4, 2)), w_bits=4, a_bits=4)
        >>> optimizers = Optimizers(qmodel, Recipe(lr=0.1, quantizer_lr=0.01), total_steps=10)
        >>> optimizers.set_step(5)["weights"]
        0.05
    """

    def __init__(self, model: nn.Module, recipe: Recipe, total_steps: int) -> None:
        self.recipe, self.total_steps, self._model = recipe, total_steps, model
        self.resting: set[str] = set()
        self.named = {group: named for group, named in parameter_groups(model).items() if named}
        if not self.named:
            raise TrainingError(
                f"{type(model).__name__}: no parameter requires a gradient. Call model.requires_grad_(True)."
            )
        if total_steps <= 0 and recipe.schedule != "constant":
            raise TrainingError(
                f"schedule: {recipe.schedule!r} has to know how many steps the run has, and the loader has no length. "
                'Give it a __len__, or train with schedule="constant".'
            )
        self.base_lr = {WEIGHTS: recipe.lr, QUANTIZERS: recipe.quantizer_lr}
        kinds = {WEIGHTS: recipe.optimizer, QUANTIZERS: recipe.quantizer_optimizer}
        check_optimizer(recipe.optimizer, "optimizer")
        check_optimizer(recipe.quantizer_optimizer, "quantizer_optimizer")
        spared = undecayed(model, recipe)
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        for group, named in self.named.items():
            groups = decay_groups(group, named, recipe, spared)
            self.optimizers[group] = make_optimizer(kinds[group], groups, self.base_lr[group], recipe.momentum)
        self._fresh = {group: _group_settings(optimizer) for group, optimizer in self.optimizers.items()}

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All parameters that the next step changes."""
        awake = [named for group, named in self.named.items() if group not in self.resting]
        return [parameter for named in awake for parameter in named.values()]

    def rates(self, step: int) -> dict[str, float]:
        """Return the learning rates of a step, counted from 0, by group."""
        recipe = self.recipe
        fall_steps = recipe.step_epochs * self.total_steps // recipe.epochs
        factor = lr_factor(
            step, self.total_steps, recipe.schedule, recipe.warmup_steps, fall_steps=fall_steps,
            fall=recipe.step_factor,
        )  # fmt: skip
        return {group: base * factor for group, base in self.base_lr.items()}

    def set_step(self, step: int) -> dict[str, float]:
        """Set the learning rates of a step, counted from 0, and return them by group."""
        rates = self.rates(step)
        for group, optimizer in self.optimizers.items():
            for parameters in optimizer.param_groups:
                parameters["lr"] = rates[group]
        return rates

    def step(self) -> None:
        """Update all parameters except those of resting groups, whose gradients are dropped."""
        sizes = parameter_sizes(self._model) if self.recipe.lr_unit == "size" else None
        for group, optimizer in self.optimizers.items():
            if group in self.resting:
                optimizer.zero_grad(set_to_none=True)
            elif sizes is not None:
                step_in_sizes(optimizer, sizes)
            else:
                optimizer.step()

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state as flat tensors, `GROUP/SLOT/PARAMETER`, such as `weights/momentum_buffer/conv.weight`."""
        return {
            f"{group}/{key}": value
            for group, named in self.named.items()
            for key, value in _flat_state(self.optimizers[group], named, self._fresh[group]).items()
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Replace the state by what `state_dict` returned.

        Args:
            state: Flat tensors by name.

        Raises:
            TrainingError: If an entry belongs to no parameter of this model, or has another shape.
        """
        split: dict[str, dict[str, Tensor]] = {group: {} for group in self.named}
        for key, value in state.items():
            group, _, rest = key.partition("/")
            if group not in split:
                raise TrainingError(f"optimizer state {key!r} of shape {tuple(value.shape)} fits no parameter.")
            split[group][rest] = value
        for group, named in self.named.items():
            _restore_state(self.optimizers[group], named, self._fresh[group], split[group], f"{group}/")


_OURS = {"sgd": "momentum"}  # names that mean something else in timm
_SHAPES = ((4, 3, 2, 2), (4, 3), (4,), (1,), ())  # of the parameters that an optimizer is tried with


def check_optimizer(name: str, field: str) -> None:
    """Raise unless a recipe may name this optimizer in this field, `"optimizer"` or `"quantizer_optimizer"`.

    Raises:
        TrainingError: If timm has no such optimizer (the message says the nearest), or it cannot be used here.

    Example:
        >>> check_optimizer("adamw", "optimizer")
    """
    from timm.optim import list_optimizers

    valid = [str(known) for known in list_optimizers()]
    if name not in valid:
        raise TrainingError(
            f"{field}: {name!r} is no optimizer of timm's factory, as sgd, nesterov, adam, adamw, lamb or lion are."
            f"{nearest(name, valid)}"
        )
    problem = _problem(name)
    if problem:
        raise TrainingError(f"{field}: {name!r} cannot be used: {problem}. Try sgd, adamw, lamb or lion.")


def make_optimizer(name: str, groups: list[dict[str, Any]], lr: float, momentum: float = 0.9) -> torch.optim.Optimizer:
    """Return an optimizer by a name that `check_optimizer` accepts; each group has its own `weight_decay`.

    Example:
        >>> make_optimizer("sgd", [{"params": [nn.Parameter(torch.zeros(2))]}], 0.1).defaults["nesterov"]
        False
    """
    from timm.optim import create_optimizer_v2

    made: torch.optim.Optimizer = create_optimizer_v2(
        groups, opt=_OURS.get(name, name), lr=lr, weight_decay=0.0, momentum=momentum
    )
    return made


@functools.cache
def _problem(name: str) -> str:
    """Return why an optimizer cannot be used, found by two steps with small tensors; `""` if it can."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        generator = torch.Generator().manual_seed(0)
        parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in _SHAPES]
        try:
            optimizer = make_optimizer(name, [{"params": parameters, "weight_decay": 0.1}], 1e-3)
            for _ in range(2):
                for parameter in parameters:
                    parameter.grad = torch.randn(parameter.shape, generator=generator)
                optimizer.step()
        except Exception as error:  # NOTE: it may lack anything: a closure, a graph, CUDA, another package
            what = str(error).splitlines()[0] if str(error) else type(error).__name__
            return f"a step with nothing but gradients failed ({what})"
    for parameter in parameters:
        for slot, value in optimizer.state[parameter].items():
            if not isinstance(value, (Tensor, int, float)):
                return f"its state {slot!r} is a {type(value).__name__}, and checkpoints keep tensors and numbers"
    return ""


_TYPES = {"bool": (bool, torch.bool), "int": (int, torch.int64), "float": (float, torch.float64)}
_VALUES = (Tensor, bool, int, float)
_GROUP = "group."
_OTHERS = ("params", "lr", "initial_lr")  # of a group, and no state: the rates are a function of the step


def _group_settings(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Return the settings of a fresh optimizer's parameter groups; whatever differs from them later is state."""
    return [copy.deepcopy({k: v for k, v in group.items() if k != "params"}) for group in optimizer.param_groups]


def _flat_state(
    optimizer: torch.optim.Optimizer, named: dict[str, nn.Parameter], fresh: list[dict[str, Any]]
) -> dict[str, Tensor]:
    """Return the state of one optimizer; `named` are its parameters, `fresh` its settings before the first step."""
    found = {}
    for name, parameter in named.items():
        for slot, value in optimizer.state.get(parameter, {}).items():
            if value is not None:
                key, tensor = _as_tensor(slot, value)
                found[f"{key}/{name}"] = tensor
    for i, (group, before) in enumerate(zip(optimizer.param_groups, fresh, strict=True)):
        for slot, value in group.items():
            if slot not in _OTHERS and isinstance(value, _VALUES) and not _same(before.get(slot), value):
                key, tensor = _as_tensor(slot, value)
                found[f"{_GROUP}{key}/{i}"] = tensor
    return found


def _restore_state(
    optimizer: torch.optim.Optimizer, named: dict[str, nn.Parameter], fresh: list[dict[str, Any]],
    state: dict[str, Tensor], where: str = "",
) -> None:  # fmt: skip
    """Replace the state of one optimizer by what `_flat_state` returned.

    Raises:
        TrainingError: If an entry belongs to no parameter or group, or has an impossible shape; `where` is the prefix
            of its name in the message. Nothing is changed then.
    """
    loaded: dict[str, dict[str, Any]] = {}
    groups: list[dict[str, Any]] = [{} for _ in fresh]
    for key, tensor in state.items():
        slot, _, name = key.partition("/")
        if slot.startswith(_GROUP) and name.isdigit() and int(name) < len(groups):
            groups[int(name)].update([_as_value(slot.removeprefix(_GROUP), tensor, None)])
            continue
        parameter = named.get(name)
        if parameter is None or not _fits(tensor, parameter):
            raise TrainingError(f"optimizer state {where + key!r} of shape {tuple(tensor.shape)} fits no parameter.")
        loaded.setdefault(name, {}).update([_as_value(slot, tensor, parameter)])
    optimizer.state.clear()
    for name, slots in loaded.items():
        optimizer.state[named[name]] = slots
    for group, before, saved in zip(optimizer.param_groups, fresh, groups, strict=True):
        for slot in [slot for slot in group if slot not in before and slot not in _OTHERS]:
            del group[slot]
        group.update({slot: value for slot, value in before.items() if slot != "lr"})
        group.update(saved)


def _fits(tensor: Tensor, parameter: Tensor) -> bool:
    """Return whether a parameter's state may have this shape: the same, some sizes 1 instead, or fewer dimensions."""
    if tensor.dim() != parameter.dim():
        return tensor.dim() < parameter.dim()
    return all(size in (1, own) for size, own in zip(tensor.shape, parameter.shape, strict=True))


def _same(a: Any, b: Any) -> bool:
    return isinstance(a, _VALUES) and type(a) is type(b) and bool(a == b)


def _as_tensor(slot: str, value: Any) -> tuple[str, Tensor]:
    """Return the name of a slot, which ends in the type of a number, and its value as a tensor."""
    if isinstance(value, Tensor):
        return slot, value
    for word, (kind, dtype) in _TYPES.items():
        if type(value) is kind:
            return f"{slot}:{word}", torch.tensor(value, dtype=dtype)
    raise TrainingError(f"optimizer state {slot!r}: expected a tensor or a number, found a {type(value).__name__}.")


def _as_value(slot: str, tensor: Tensor, parameter: Tensor | None) -> tuple[str, Any]:
    """Return the name and value of a slot, as the optimizer had them; `parameter` is None for state of a group."""
    plain, _, word = slot.partition(":")
    if word in _TYPES:
        return plain, _TYPES[word][0](tensor.item())
    if parameter is None or plain in COUNTS:  # torch keeps these on the CPU, whatever the parameter's device
        return slot, tensor.clone()
    if tensor.shape == parameter.shape:  # in the parameter's memory format
        return slot, torch.empty_like(parameter.detach(), dtype=tensor.dtype).copy_(tensor)
    return slot, tensor.to(parameter.device, copy=True)
