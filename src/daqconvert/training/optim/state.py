"""The state of an optimizer as flat tensors by name, and back, bit for bit.

`SLOT/PARAMETER` is a tensor of one parameter's state, as `momentum_buffer/conv.weight`. A Python number is a scalar
tensor whose slot says its type: `step:int/conv.weight`. What an optimizer keeps once for a whole parameter group is
`group.SLOT/INDEX`, as `group.step/0`.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from daqconvert.errors import TrainingError

_TYPES = {"bool": (bool, torch.bool), "int": (int, torch.int64), "float": (float, torch.float64)}
_VALUES = (Tensor, bool, int, float)
_GROUP = "group."
_OTHERS = ("params", "lr", "initial_lr")  # of a parameter group; the rates are a function of the step
_ON_CPU = ("step", "mu_product")  # torch keeps these there, whatever the parameter's device


def group_settings(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Return what the parameter groups of a fresh optimizer say: what differs later is state."""
    return [copy.deepcopy({k: v for k, v in group.items() if k != "params"}) for group in optimizer.param_groups]


def flat_state(
    optimizer: torch.optim.Optimizer, named: dict[str, nn.Parameter], fresh: list[dict[str, Any]]
) -> dict[str, Tensor]:
    """Return the state of one optimizer.

    Args:
        optimizer: One of `check_optimizer`'s.
        named: Its parameters by name.
        fresh: From `group_settings`, before its first step.
    """
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


def restore_state(
    optimizer: torch.optim.Optimizer, named: dict[str, nn.Parameter], fresh: list[dict[str, Any]],
    state: dict[str, Tensor], where: str = "",
) -> None:  # fmt: skip
    """Replace the state of one optimizer by what `flat_state` returned.

    Args:
        optimizer: Of the same kind, with the same groups.
        named: Its parameters by name.
        fresh: From `group_settings`, before its first step.
        state: Flat tensors.
        where: Prefix of their names, for messages.

    Raises:
        TrainingError: If an entry belongs to no parameter or group, or has a shape that cannot be; nothing is
            changed then.
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
    """Whether state of this shape may be a parameter's: its own, parts of it summed up, or fewer dimensions."""
    if tensor.dim() != parameter.dim():
        return tensor.dim() < parameter.dim()
    return all(size in (1, own) for size, own in zip(tensor.shape, parameter.shape, strict=True))


def _same(a: Any, b: Any) -> bool:
    return isinstance(a, _VALUES) and type(a) is type(b) and bool(a == b)


def _as_tensor(slot: str, value: Any) -> tuple[str, Tensor]:
    if isinstance(value, Tensor):
        return slot, value
    for word, (kind, dtype) in _TYPES.items():
        if type(value) is kind:
            return f"{slot}:{word}", torch.tensor(value, dtype=dtype)
    raise TrainingError(f"optimizer state {slot!r}: expected a tensor or a number, found a {type(value).__name__}.")


def _as_value(slot: str, tensor: Tensor, parameter: Tensor | None) -> tuple[str, Any]:
    """A slot and its value, as the optimizer had it."""
    plain, _, word = slot.partition(":")
    if word in _TYPES:
        return plain, _TYPES[word][0](tensor.item())
    if parameter is None or plain in _ON_CPU:
        return slot, tensor.clone()
    if tensor.shape == parameter.shape:  # in the parameter's memory format
        return slot, torch.empty_like(parameter.detach(), dtype=tensor.dtype).copy_(tensor)
    return slot, tensor.to(parameter.device, copy=True)
