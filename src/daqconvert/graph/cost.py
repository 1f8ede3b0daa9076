"""Multiply-accumulates of each site, counted on a forward that computes shapes and no values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._pytree import tree_map_only

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
    model: nn.Module, names: dict[str, nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, int] | None:
    """Return multiply-accumulates per site for one element of the batch, or None where the forward cannot run so.

    Args:
        model: Any device, meta included; not changed.
        names: Sites by name.
        args: Positional example inputs; their first dimension is the batch.
        kwargs: Keyword example inputs.
    """
    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
    batch = int(tensors[0].shape[0]) if tensors and tensors[0].dim() else 1
    macs = dict.fromkeys(names, 0)
    handles = []

    def count(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            macs[name] += _macs(module, inputs, output)

        return hook

    try:
        for name, module in names.items():
            handles.append(module.register_forward_hook(count(name)))
        with evaluating(model), torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
            state = {k: mode.from_tensor(v) for k, v in (*model.named_parameters(), *model.named_buffers())}
            fake_args, fake_kwargs = tree_map_only(Tensor, mode.from_tensor, (args, kwargs))
            functional_call(model, state, fake_args, fake_kwargs)
    except Exception:  # NOTE: the model's own code may do what fake tensors cannot (.item(), numpy): no size, no guess
        return None
    finally:
        for handle in handles:
            handle.remove()
    return {name: count // max(batch, 1) for name, count in macs.items()}


def _macs(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> int:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or not isinstance(output, Tensor):
        return 0
    if getattr(module, "transposed", False):
        return int(inputs[0].numel()) * int(weight[0].numel())
    return int(output.numel()) * (int(weight.numel()) // int(weight.shape[0]))
