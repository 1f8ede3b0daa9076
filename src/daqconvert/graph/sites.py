"""The list of sites of a model: everything that convolves or multiplies by a weight, with its reason if left alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from daqconvert.graph.cost import count_macs, default_input
from daqconvert.graph.flow import Flow, read_flow
from daqconvert.graph.trace import trace
from daqconvert.layers.base import QuantizedLayer
from daqconvert.layers.frozen import FrozenLayer
from daqconvert.layers.registry import is_site_type, quantized_class
from daqconvert.modes import evaluating
from daqconvert.spec import Site

FUSED_PARENTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
FUNCTIONAL = {"linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}


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
    """
    paths = dict(model.named_modules(remove_duplicate=False))
    own: dict[int, str] = {}
    for name, module in paths.items():
        if is_site_type(module) or isinstance(module, (QuantizedLayer, FrozenLayer)):
            own.setdefault(id(module), name)
    named = {name: paths[name] for name in own.values()}
    aliases = {name: own[id(module)] for name, module in paths.items() if id(module) in own}
    flow = _flow(model, paths, aliases)
    args, kwargs, size = _inputs(model, example_inputs)
    macs = count_macs(model, named, args, kwargs) if size is not None else None
    first, last = _ends(flow, named)
    order = [*(flow.order if flow else ()), *named]
    notes = _notes(model, paths, aliases, flow)
    sites = [
        _site(name, named[name], paths, name in first, name in last, flow, macs, notes.get(name, ()))
        for name in dict.fromkeys(order)
    ]
    sites += _functional(model, flow)
    inside = {id(p) for s in sites if s.name in named for p in named[s.name].parameters()}
    others = sum(t.numel() for t in _state(model) if id(t) not in inside)
    return Found(tuple(sites), "fx" if flow else "modules", others, size if macs is not None else None)


def _flow(model: nn.Module, paths: dict[str, nn.Module], aliases: dict[str, str]) -> Flow | None:
    if "" in aliases:  # the root itself is a site: fx would look inside it
        return Flow((aliases[""],), frozenset({""}), frozenset({""}))
    with evaluating(model):
        graph = trace(model)
        return None if graph is None else read_flow(graph, paths, aliases)


def _inputs(model: nn.Module, example: Any) -> tuple[tuple[Any, ...], dict[str, Any], tuple[int, ...] | None]:
    if example is None:
        size = default_input(model)
        if size is None:
            return (), {}, None
        like = next(model.parameters(), torch.empty(0))
        dtype = like.dtype if like.is_floating_point() else torch.float32
        return (torch.empty(size, dtype=dtype, device=like.device),), {}, size
    args = (example,) if isinstance(example, Tensor) else tuple(example) if isinstance(example, Sequence) else ()
    kwargs = dict(example) if isinstance(example, dict) else {}
    sizes = [tuple(a.shape) for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
    return args, kwargs, sizes[0] if sizes else ()


def _ends(flow: Flow | None, named: dict[str, nn.Module]) -> tuple[frozenset[str], frozenset[str]]:
    """First and last sites: from the dataflow, else the ends of the module order."""
    if flow is not None:
        return flow.first, flow.last
    names = [name for name, module in named.items() if quantized_class(type(module)) is not None]
    return (frozenset(names[:1]), frozenset(names[-1:]))


def _site(
    name: str,
    module: nn.Module,
    paths: dict[str, nn.Module],
    first: bool,
    last: bool,
    flow: Flow | None,
    macs: dict[str, int] | None,
    notes: tuple[str, ...],
) -> Site:
    weight = module._parameters.get("weight")
    shape = () if weight is None or isinstance(weight, UninitializedParameter) else tuple(weight.shape)
    channels, reduction = _extent(module, shape)
    sizes = [p.numel() for p in module.parameters() if not isinstance(p, UninitializedParameter)]
    calls = macs.get(name) if macs else None
    if calls == 0 and shape:
        notes = (*notes, "not called in evaluation with this input")
    return Site(
        name=name,
        kind=type(module).__name__,
        weight_shape=shape,
        out_channels=channels,
        reduction=reduction,
        params=sum(sizes),
        reason=_reason(name, module, paths, flow),
        first=first,
        last=last,
        nonnegative=flow is not None and name in flow.nonnegative,
        macs=calls,
        notes=notes,
    )


def _extent(module: nn.Module, shape: tuple[int, ...]) -> tuple[int, int]:
    """Output channels and products per output element."""
    if not shape:
        return 0, 0
    groups = int(getattr(module, "groups", 1))
    if getattr(module, "transposed", False):
        return shape[1] * groups, shape[0] // groups * math.prod(shape[2:])
    return shape[0], math.prod(shape[1:])


def _reason(name: str, module: nn.Module, paths: dict[str, nn.Module], flow: Flow | None) -> str:
    """Why a site cannot be converted; empty if it can."""
    parent = paths.get(name.rpartition(".")[0]) if name else None
    kind = type(module).__name__
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
    if "weight" not in module._parameters:
        return "its weight is computed from other parameters"
    if quantized_class(type(module)) is None:
        return f"no quantized form is registered for exactly this class ({kind})"
    if flow is not None and f"{name}.weight".lstrip(".") in flow.weights_read:
        return "another module's forward uses its weight without calling it"
    return ""


def _notes(
    model: nn.Module, paths: dict[str, nn.Module], aliases: dict[str, str], flow: Flow | None
) -> dict[str, tuple[str, ...]]:
    notes: dict[str, list[str]] = {}
    for alias, name in aliases.items():
        if alias != name:
            notes.setdefault(name, []).append(f"also named {alias}")
    owners: dict[int, str] = {}
    for name in dict.fromkeys(aliases.values()):
        weight = paths[name]._parameters.get("weight")
        if weight is not None and owners.setdefault(id(weight), name) != name:
            notes.setdefault(name, []).append(f"shares its weight with {owners[id(weight)]}")
        if flow is None:
            continue
        if name and name not in flow.order:
            notes.setdefault(name, []).append("not called in evaluation")
    return {name: tuple(lines) for name, lines in notes.items()}


def _functional(model: nn.Module, flow: Flow | None) -> list[Site]:
    """Functional convolutions and linears on bare parameters: listed, so that nothing is skipped in silence."""
    if flow is None:
        return []
    sites = []
    for target, call in flow.weights_read.items():
        owner_path, _, attribute = target.rpartition(".")
        owner = model.get_submodule(owner_path)
        value = getattr(owner, attribute, None)
        if call in FUNCTIONAL and isinstance(value, nn.Parameter) and value.dim() > 1 and not is_site_type(owner):
            reason = "functional call on a bare parameter"
            sites.append(Site(target, f"F.{call}", tuple(value.shape), value.shape[0], 0, value.numel(), reason))
    return sites


def _state(model: nn.Module) -> list[Tensor]:
    tensors = [*model.parameters(), *(b for b in model.buffers())]
    return [t for t in tensors if not isinstance(t, UninitializedParameter)]
