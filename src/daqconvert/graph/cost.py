"""Multiply-accumulates of each site, counted on a forward that computes shapes and no values."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._pytree import tree_map_only

from daqconvert.errors import ConversionError
from daqconvert.modes import evaluating


def default_input(model: nn.Module) -> tuple[int, ...] | None:
    """Return `(1, C, H, W)` from a timm model's `pretrained_cfg`, or None: sizes are never guessed."""
    cfg = getattr(model, "pretrained_cfg", None)
    size = cfg.get("input_size") if isinstance(cfg, dict) else None
    channels = getattr(model, "in_chans", None)
    if not (isinstance(size, (tuple, list)) and len(size) == 3):
        return None
    stem = next((m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Conv1d, nn.Linear))), None)
    if channels is None and isinstance(stem, nn.Conv2d):
        channels = stem.in_channels if stem.in_channels <= 4 else size[0]
    return (1, int(channels or size[0]), int(size[1]), int(size[2]))


def count_macs(
    model: nn.Module,
    names: dict[str, nn.Module],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    required: bool = False,
) -> dict[str, int] | None:
    """Return multiply-accumulates per site for one element of the batch, or None where the forward cannot run so.

    Args:
        model: Any device, meta included; a copy of the user's, for its code may keep what it sees.
        names: Sites by name.
        args: Positional example inputs; their first dimension is the batch.
        kwargs: Keyword example inputs.
        required: The inputs are the user's own: run on their values where shapes are not enough; say if that fails.

    Raises:
        ConversionError: If `required` and the model cannot run on these inputs.
    """
    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
    batch = int(tensors[0].shape[0]) if tensors and tensors[0].dim() else 1
    try:
        macs = _count(names, lambda: _run_fake(model, args, kwargs), model)
    except Exception:  # NOTE: the model's own code may do what fake tensors cannot (.item(), numpy): no size, no guess
        if not required:
            return None
        try:
            macs = _count(names, lambda: model(*args, **kwargs), model)
        except Exception as error:
            raise ConversionError(
                f"example_inputs: {type(model).__name__} fails on them in evaluation mode: {error}"
            ) from error
    return {name: count // max(batch, 1) for name, count in macs.items()}


def _count(names: dict[str, nn.Module], forward: Callable[[], Any], model: nn.Module) -> dict[str, int]:
    macs = dict.fromkeys(names, 0)

    def count(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            macs[name] += _macs(module, args[0] if args else kwargs.get("input"), output)

        return hook

    with ExitStack() as stack:
        for name, module in names.items():
            handle = module.register_forward_hook(count(name), with_kwargs=True)
            stack.callback(handle.remove)
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.no_grad())
        forward()
    return macs


def _run_fake(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        held = (*model.named_parameters(), *model.named_buffers())
        state: dict[str, Tensor] = {name: mode.from_tensor(value) for name, value in held}
        fake_args, fake_kwargs = tree_map_only(Tensor, mode.from_tensor, (args, kwargs))
        functional_call(model, state, fake_args, fake_kwargs)


def _macs(module: nn.Module, x: Any, output: Any) -> int:
    weight = module._parameters.get("weight")
    if weight is None or not isinstance(output, Tensor):
        return 0
    if getattr(module, "transposed", False):
        return int(x.numel()) * int(weight[0].numel())
    return int(output.numel()) * (int(weight.numel()) // int(weight.shape[0]))
