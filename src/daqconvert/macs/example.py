"""Multiply-accumulates of each site, counted on a forward that computes shapes and no values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._pytree import tree_map_only

from daqconvert.errors import ConversionError
from daqconvert.macs.counter import Event, counting
from daqconvert.models import evaluating


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
    names: Mapping[str, Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    required: bool = False,
    tensors: Mapping[str, str] | None = None,
    modules: Mapping[str, str] | None = None,
    products: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, int] | None:
    """Return multiply-accumulates per site for one element of the batch, or None where the forward cannot run so.

    A weight's products count for the module that the weight is a parameter of, or for the bare parameter, whoever
    computes them; a fused kernel's for each of its weights.

    Args:
        model: Any device, meta included; a copy of the user's, for its code may keep what it sees.
        names: Sites by name: dotted names of modules or of bare parameters and buffers. The values do not matter.
        args: Positional example inputs; their first dimension is the batch.
        kwargs: Keyword example inputs.
        required: The inputs are the user's own: run on their values where shapes are not enough; say if that fails.
        tensors: Parameter or buffer -> site, for sites with another name than their weight's module.
        modules: Module -> site, for convolutions there whose weight depends on the data.
        products: Module -> sites that are products of activations, in the order in which it computes them.

    Raises:
        ConversionError: If `required` and the model cannot run on these inputs.
    """
    events = observe(model, args, kwargs, required=required)
    if events is None:
        return None
    found = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
    batch = int(found[0].shape[0]) if found and found[0].dim() else 1
    macs = dict.fromkeys(names, 0)
    attention: dict[str, list[int]] = {}
    for event in events:
        site = None if event.attention else event.site(names, tensors or {}, modules or {})
        if event.attention:
            attention.setdefault(event.module, []).append(event.macs)
        elif site is not None:
            macs[site] = macs.get(site, 0) + event.macs
    for module, sites in (products or {}).items():
        ran = attention.get(module, [])
        if len(sites) == 1 or (sites and len(ran) % len(sites) == 0):  # several: in turns, call after call
            macs |= {site: sum(ran if len(sites) == 1 else ran[i :: len(sites)]) for i, site in enumerate(sites)}
    return {name: count // max(batch, 1) for name, count in macs.items()}


def observe(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, required: bool = False
) -> list[Event] | None:
    """Return every product of one forward in evaluation mode, run on shapes alone where the model's code allows.

    Args:
        model: As for `count_macs`.
        args: Positional example inputs.
        kwargs: Keyword example inputs.
        required: As for `count_macs`.

    Raises:
        ConversionError: If `required` and the model cannot run on these inputs.
    """
    with evaluating(model), torch.no_grad(), _unfused():
        try:
            return _on_shapes(model, args, kwargs)
        except Exception:  # NOTE: the model's code may do what fake tensors cannot (.item(), numpy): no guess
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
    """Every parameter and buffer of every module, once a module: `functional_call` puts back no module's twice."""
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
    """Switch off attention's fused kernels: fake tensors run them on real zeros; their parts count the same."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
