"""The list of sites of a model: everything that convolves or multiplies by a weight, with its reason if left alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_map_only

from daqconvert.errors import ConversionError
from daqconvert.graph.cost import count_macs, default_input
from daqconvert.graph.view import View, look
from daqconvert.layers.registry import is_site_type, quantized_class
from daqconvert.modes import copy_model
from daqconvert.spec import Site

FUSED_PARENTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


@dataclass(frozen=True)
class Found:
    """The sites of a model, and where their facts come from.

    Attributes:
        sites: In order of execution where fx can tell, else of registration.
        order: `"fx"` or `"modules"`.
        other_params: Parameters and buffers outside the sites.
        input_size: Size of the example input behind the MACs, or None.
    """

    sites: tuple[Site, ...]
    order: str
    other_params: int
    input_size: tuple[int, ...] | None


def find_sites(model: nn.Module, example_inputs: Any = None) -> Found:
    """Find every site of a model.

    Args:
        model: Any module, on any device; not changed.
        example_inputs: A tensor, a tuple of positional or a dict of keyword arguments; gives the MACs. Without it a
            timm model's own input size is used, and any other model's MACs stay unknown.

    Raises:
        ConversionError: If the model cannot be copied, or cannot run on the example inputs.
    """
    model = copy_model(model, to_look_at=True)  # its own code runs below and may keep what it sees
    args, kwargs, size = _inputs(model, example_inputs)
    required = example_inputs is not None
    view = look(model, (len(args), frozenset(kwargs)) if required else None)
    macs = count_macs(model, view.named, args, kwargs, required=required) if size is not None else None
    first, last = _ends(view)
    notes, bare = _notes(view), view.bare or {}
    order = dict.fromkeys([*(view.flow.order if view.flow else ()), *view.named, *bare])
    sites = [
        _bare_site(name, bare[name], model.get_parameter(name), name in first, name in last)
        if name in bare
        else _site(name, view, macs, name in first, name in last, notes.get(name, ()))
        for name in order
    ]
    inside = {id(p) for module in view.named.values() for p in module.parameters()}
    inside |= {id(model.get_parameter(name)) for name in bare}
    others = sum(t.numel() for t in _state(model) if id(t) not in inside)
    return Found(tuple(sites), "fx" if view.flow else "modules", others, size if macs is not None else None)


def _inputs(model: nn.Module, example: Any) -> tuple[tuple[Any, ...], dict[str, Any], tuple[int, ...] | None]:
    like = next((p for p in model.parameters() if not isinstance(p, UninitializedParameter)), torch.empty(0))
    if example is None:
        size = default_input(model)
        if size is None:
            return (), {}, None
        dtype = like.dtype if like.is_floating_point() else torch.float32
        return (torch.empty(size, dtype=dtype, device=like.device),), {}, size
    if not isinstance(example, (Tensor, Sequence, Mapping)) or isinstance(example, str):
        raise ConversionError(
            "example_inputs: expected a tensor, a tuple of positional or a dict of keyword arguments; "
            f"found {type(example).__name__}."
        )
    example = tree_map_only(Tensor, lambda t: t.to(like.device), example)
    args = (example,) if isinstance(example, Tensor) else tuple(example) if isinstance(example, Sequence) else ()
    kwargs = dict(example) if isinstance(example, Mapping) else {}
    sizes = [tuple(a.shape) for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
    return args, kwargs, sizes[0] if sizes else ()


def _ends(view: View) -> tuple[frozenset[str], frozenset[str]]:
    """First and last sites: from the dataflow, else the ends of the module order."""
    if view.flow is not None:
        return view.flow.first, view.flow.last
    names = [name for name, module in view.named.items() if quantized_class(type(module)) is not None]
    return frozenset(names[:1]), frozenset(names[-1:])


def _site(name: str, view: View, macs: dict[str, int] | None, first: bool, last: bool, notes: tuple[str, ...]) -> Site:
    module = view.paths[name]
    weight = module._parameters.get("weight")
    shape = () if weight is None or isinstance(weight, UninitializedParameter) else tuple(weight.shape)
    channels, reduction = _extent(module, shape)
    reason = _reason(name, module, view)
    calls = macs.get(name) if macs else None
    if calls == 0 and reason:
        calls = None  # a fused or functional call does its work, unseen
    elif calls == 0 and shape and "not called in evaluation" not in notes:
        notes = (*notes, "not called in evaluation with this input")
    return Site(
        name=name,
        kind=type(module).__name__,
        weight_shape=shape,
        out_channels=channels,
        reduction=reduction,
        params=_own_parameters(module),
        reason=reason,
        first=first,
        last=last,
        nonnegative=view.flow is not None and name in view.flow.nonnegative,
        macs=calls,
        notes=notes,
    )


def _bare_site(name: str, call: str, weight: Tensor, first: bool, last: bool) -> Site:
    """A functional product with a parameter of no layer: listed, so that nothing is skipped in silence."""
    return Site(
        name, call, tuple(weight.shape), params=weight.numel(), first=first, last=last,
        reason="functional call on a bare parameter",
    )  # fmt: skip


def _own_parameters(module: nn.Module) -> int:
    """Number of parameters of a site, without those of sites inside it (an attention block's output projection)."""
    inside = [m for m in module.modules() if m is not module and is_site_type(m)]
    below = {id(p) for m in inside for p in m.parameters()}
    return sum(p.numel() for p in _initialized(module.parameters()) if id(p) not in below)


def _extent(module: nn.Module, shape: tuple[int, ...]) -> tuple[int, int]:
    """Output channels and products per output element."""
    if not shape:
        return 0, 0
    groups = int(getattr(module, "groups", 1))
    if getattr(module, "transposed", False):
        return shape[1] * groups, shape[0] // groups * math.prod(shape[2:])
    return shape[0], math.prod(shape[1:])


def _reason(name: str, module: nn.Module, view: View) -> str:
    """Why a site cannot be converted; empty if it can."""
    parent = view.paths.get(name.rpartition(".")[0]) if name else None
    kind, weight = type(module).__name__, module._parameters.get("weight")
    if isinstance(module, nn.MultiheadAttention):
        return "attention block: its products run in one fused function"
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return "recurrent layer: its products run in one fused kernel"
    if isinstance(parent, FUSED_PARENTS):
        return f"{type(parent).__name__} uses its weight without calling it"
    if parametrize.is_parametrized(module):
        return "its weight is parametrized"
    if any(isinstance(p, UninitializedParameter) for p in module.parameters()):
        return "lazy: its weight has no shape before a first forward"
    if weight is None:
        return "its weight is computed from other parameters"
    if quantized_class(type(module)) is None:
        return f"no quantized form is registered for exactly this class ({kind})"
    if not weight.is_floating_point():
        return f"its weight is {str(weight.dtype).removeprefix('torch.')}"
    if name in view.read:
        return "another module's forward uses its weight without calling it"
    return ""


def _notes(view: View) -> dict[str, tuple[str, ...]]:
    notes: dict[str, list[str]] = {}
    for alias, name in view.aliases.items():
        if alias != name:
            notes.setdefault(name, []).append(f"also named {alias}")
    owners: dict[int, str] = {}
    for path, module in view.paths.items():
        for parameter in module._parameters.values():
            owners.setdefault(id(parameter), view.aliases.get(path, path))
    for name, module in view.named.items():
        weight = module._parameters.get("weight")
        if weight is not None and owners[id(weight)] != name:
            notes.setdefault(name, []).append(f"shares its weight with {owners[id(weight)] or '(root)'}")
        if view.flow is not None and name not in view.flow.order and not _reason(name, module, view):
            notes.setdefault(name, []).append("not called in evaluation")
    return {name: tuple(lines) for name, lines in notes.items()}


def _initialized(tensors: Any) -> list[Tensor]:
    return [t for t in tensors if not isinstance(t, UninitializedParameter)]


def _state(model: nn.Module) -> list[Tensor]:
    return _initialized([*model.parameters(), *model.buffers()])
