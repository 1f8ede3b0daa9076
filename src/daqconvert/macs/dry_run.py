"""Multiply-accumulates of each site, counted in a forward that computes only shapes if the model's code allows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn.parameter import UninitializedParameter
from torch.utils._pytree import tree_map_only

from daqconvert.errors import ConversionError
from daqconvert.macs.attribution import Places
from daqconvert.macs.counter import UNOWNED, Event, counting
from daqconvert.models import evaluating


def example_arguments(
    model: nn.Module, example_inputs: Any
) -> tuple[tuple[Any, ...], dict[str, Any], tuple[int, ...] | None]:
    """Return the positional and keyword arguments to call a model with, and the size of the first tensor.

    Args:
        model: The model; the arguments are moved to its device.
        example_inputs: A tensor, a tuple of positional or a dict of keyword arguments, or None for the input size that
            a timm model states. Sizes are never guessed: for a model that states none, no arguments and None are
            returned.

    Raises:
        ConversionError: If `example_inputs` is of any other type.
    """
    like = next((p for p in model.parameters() if not isinstance(p, UninitializedParameter)), torch.empty(0))
    if example_inputs is None:
        size = _default_size(model)
        if size is None:
            return (), {}, None
        dtype = like.dtype if like.is_floating_point() else torch.float32
        return (torch.empty(size, dtype=dtype, device=like.device),), {}, size
    if isinstance(example_inputs, Mapping):
        example_inputs = dict(example_inputs)  # a mapping of another class would be one value to move
    if not isinstance(example_inputs, (Tensor, Sequence, Mapping)) or isinstance(example_inputs, str):
        raise ConversionError(
            "example_inputs: expected a tensor, a tuple of positional or a dict of keyword arguments; "
            f"found {type(example_inputs).__name__}."
        )
    example = tree_map_only(Tensor, lambda t: t.to(like.device), example_inputs)
    args = (example,) if isinstance(example, Tensor) else tuple(example) if isinstance(example, Sequence) else ()
    kwargs = dict(example) if isinstance(example, Mapping) else {}
    sizes = [tuple(a.shape) for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
    return args, kwargs, sizes[0] if sizes else ()


def _default_size(model: nn.Module) -> tuple[int, ...] | None:
    """Return `(1, C, H, W)` from a timm model's `pretrained_cfg`; None for any other model."""
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
    model: nn.Module, places: Places, args: tuple[Any, ...], kwargs: dict[str, Any], *, required: bool = False,
    unplaced: list[Event] | None = None,
) -> dict[str, int] | None:  # fmt: skip
    """Return the multiply-accumulates of each site for one element of the batch; None if the forward cannot run.

    The products of a weight count for the module that owns the weight (or for the bare parameter), whichever module
    computes them; the products of a fused kernel count for each of its weights.

    Args:
        model: On any device, meta included; a copy of the user's, because its code may store what it gets.
        places: Which site a product belongs to.
        args: Positional example inputs; their first dimension is the batch.
        kwargs: Keyword example inputs.
        required: Whether the inputs are the user's own. If so, and a run on shapes fails, the model runs on their
            values, and an error is raised if this fails too.
        unplaced: If given, a list that gets the products of data with a parameter that belong to no site.

    Raises:
        ConversionError: If `required` and the model cannot run on these inputs.
    """
    events = observe(model, args, kwargs, required=required)
    if events is None:
        return None
    found = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
    batch = int(found[0].shape[0]) if found and found[0].dim() else 1
    macs = dict.fromkeys(places.sites, 0)
    attention: dict[str, list[int]] = {}
    for event in events:
        site = None if event.attention else places.site(event)
        if event.attention:
            attention.setdefault(event.module, []).append(event.macs)
        elif site is not None:
            macs[site] = macs.get(site, 0) + event.macs
        elif unplaced is not None and event.learned and event.of_data and event.tensors[0] != UNOWNED:
            unplaced.append(replace(event, macs=event.macs // max(batch, 1)))
    for module, sites in places.products.items():
        ran = attention.get(module, [])
        if len(sites) == 1 or (sites and len(ran) % len(sites) == 0):  # several sites take turns
            macs |= {site: sum(ran if len(sites) == 1 else ran[i :: len(sites)]) for i, site in enumerate(sites)}
    return {name: count // max(batch, 1) for name, count in macs.items()}


def observe(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, required: bool = False
) -> list[Event] | None:
    """Return every product of one forward in evaluation mode, run on shapes only if the model's code allows this.

    Args:
        model: On any device, meta included; a copy of the user's.
        args: Positional example inputs.
        kwargs: Keyword example inputs.
        required: If a run on shapes fails: True runs on values, and raises if this fails too; False returns None.

    Raises:
        ConversionError: If `required` and the model cannot run on these inputs.
    """
    with evaluating(model), torch.no_grad(), _unfused():
        try:
            return _on_shapes(model, args, kwargs)
        except Exception:  # NOTE: the model's code may do what fake tensors cannot (.item(), numpy)
            if not required:
                return None
        try:
            return _run(model, (args, kwargs), {}, lambda: model(*args, **kwargs))
        except Exception as error:
            raise ConversionError(
                f"example_inputs: {type(model).__name__} fails on them in evaluation mode: {error}"
            ) from error


def _on_shapes(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Event]:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        held = dict(_state(model))
        state: dict[str, Tensor] = {name: mode.from_tensor(value) for name, value in held.items()}
        fakes = {id(held[name]): fake for name, fake in state.items()}
        fake_args, fake_kwargs = tree_map_only(Tensor, mode.from_tensor, (args, kwargs))

        def forward() -> None:
            functional_call(model, state, fake_args, fake_kwargs, tie_weights=False)

        return _run(model, (fake_args, fake_kwargs), fakes, forward)


def _state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter and buffer with its name, those of a shared module once (see `functional_call`)."""
    for path, module in model.named_modules():
        for name, value in (*module._parameters.items(), *module._buffers.items()):
            if value is not None:
                yield f"{path}.{name}" if path else name, value


def _run(model: nn.Module, inputs: Any, state: dict[int, Tensor], forward: Callable[[], Any]) -> list[Event]:
    with counting(model, inputs, state) as counter:
        forward()
    return counter.events


@contextmanager
def _unfused() -> Iterator[None]:
    """Switch off attention's fused kernels, which would run on real zeros with fake tensors; the count is the same."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
