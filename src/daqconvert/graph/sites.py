"""The list of sites of a model: everything that convolves or multiplies by a weight, with its reason if left alone.

Why a layer is left alone, and what else there is to say about it.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from daqconvert.graph.call_sites import CallSite
from daqconvert.graph.calls import HELPER
from daqconvert.graph.flow import above, entries
from daqconvert.graph.output_flow import OutputFlow
from daqconvert.graph.view import View, look
from daqconvert.layers.attention import PROJECTIONS, SCORES, VALUES
from daqconvert.layers.lookup import quantized_class
from daqconvert.layers.registry import is_site_type
from daqconvert.macs import Places, count_macs, example_arguments
from daqconvert.models import copy_model
from daqconvert.spec import Site, SiteOutput


@dataclass(frozen=True)
class Found:
    """The sites of a model, and where their facts come from.

    Attributes:
        sites: In order of execution where fx can tell, else of registration.
        order: `"fx"` or `"modules"`.
        other_params: Parameters and buffers outside the sites.
        input_size: Size of the example input behind the MACs, or None.
        sums: Sums of outputs.
    """

    sites: tuple[Site, ...]
    order: str
    other_params: int
    input_size: tuple[int, ...] | None
    sums: tuple[SiteOutput, ...] = ()


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
    args, kwargs, size = example_arguments(model, example_inputs)
    required = example_inputs is not None
    view = look(model, (len(args), frozenset(kwargs)) if required else None)
    macs = _macs(model, view, args, kwargs, required) if size is not None else None
    (first, last), notes = _ends(view), site_notes(view)
    order = [name for name in _ordered(view) if not _never_multiplied(name, view, macs)]
    inside = {id(p) for module in view.named.values() for p in module.parameters()}
    sites = [_layer_site(name, view) if name in view.named else _functional_site(name, view, inside) for name in order]
    outputs = view.flow.outputs if view.flow is not None else OutputFlow()
    known = [
        dataclasses.replace(
            site, first=site.name in first, last=site.name in last, notes=notes.get(site.name, ()),
            nonnegative=site.nonnegative or (view.flow is not None and site.name in view.flow.nonnegative),
            reads=view.flow.inputs.get(site.name, "") if view.flow is not None else "",
            macs=_known(site, macs), output=outputs.sites.get(site.name),
        )
        for site in sites
    ]  # fmt: skip
    inside |= {id(p) for site in view.functional.values() for p in _weights(view, site)}
    others = sum(t.numel() for t in _state(model) if id(t) not in inside)
    return Found(
        tuple(known), "fx" if view.flow else "modules", others, size if macs is not None else None, tuple(outputs.sums)
    )


def _ends(view: View) -> tuple[frozenset[str], frozenset[str]]:
    """First and last sites: from the dataflow, else the ends of the module order."""
    if view.flow is not None:
        return view.flow.first, view.flow.last
    layers = {name for name, module in view.named.items() if not layer_reason(name, module, view)}
    names = [n for n in _ordered(view) if n in layers or (n in view.functional and _is_projection(view.functional[n]))]
    return frozenset(entries(names)), frozenset(names[-1:])


def _ordered(view: View) -> list[str]:
    """Names in order of execution, where fx can tell; what it does not see stands behind its module's others."""
    known = dict.fromkeys([*(view.flow.order if view.flow else ()), *view.named])
    before: dict[str, list[str]] = {}
    late: list[tuple[str, str]] = []
    for name, site in view.functional.items():
        out = f"{name.rpartition('.')[0]}.out_proj".lstrip(".")
        if name not in known and _in_attention(site, view) and out in known:
            before.setdefault(out, []).append(name)
        elif name not in known:
            late.append((name, site.call.modules[0]))
    return _behind([n for name in known for n in (*before.get(name, ()), name)], late)


def _behind(order: list[str], late: list[tuple[str, str]]) -> list[str]:
    """Put each late name behind the last one that is inside its module, or at the end where there is none.

    Args:
        order: Names in order.
        late: Name and module; a name is inside its module.
    """
    following: dict[str | None, str | None] = dict(itertools.pairwise([None, *order, None]))
    last: dict[str, str] = {path: name for name in order for path in above(name)}
    for name, module in late:
        at_end, behind = module not in last, last.get(module, last.get(""))
        following[name], following[behind] = following.get(behind), name
        for path in above(name):
            if at_end or len(path) > len(module) or last.get(path) == behind:
                last[path] = name
    found, at = [], following.get(None)
    while at is not None:
        found.append(at)
        at = following[at]
    return found


def _is_projection(site: CallSite) -> bool:
    return site.key[0] in PROJECTIONS


def _in_attention(site: CallSite, view: View) -> bool:
    """Whether a call is one that torch's attention block makes before its `out_proj`."""
    return isinstance(view.paths[site.call.modules[0]], nn.MultiheadAttention)


def _macs(
    model: nn.Module, view: View, args: tuple[Any, ...], kwargs: dict[str, Any], required: bool
) -> dict[str, int] | None:
    """Multiply-accumulates of every site, None where the forward cannot run on these inputs."""
    macs = count_macs(model, _places(view), args, kwargs, required=required)
    if not macs:
        return macs
    for values, site in view.functional.items():
        if site.is_product and site.call.function == VALUES:  # counted with its scores, by one fused function
            scores = values.replace(VALUES, SCORES)
            macs |= {scores: macs[scores] // 2, values: macs[scores] - macs[scores] // 2}
    parts: dict[str, list[str]] = {}
    for name, site in view.functional.items():
        for tensor in site.call.tensors if not site.call.dynamic else ():
            parts.setdefault(tensor, []).append(name)
    for whole, *others in parts.values():
        if others and not any(macs[name] for name in others):  # one product by all of the tensor
            sizes = {name: math.prod(view.functional[name].weight_shape) for name in (whole, *others)}
            total = max(sum(sizes.values()), 1)
            macs |= {name: macs[whole] * size // total for name, size in sizes.items()}
    return macs


def _places(view: View) -> Places:
    """Where the sites of a model multiply; a tensor that several sites are parts of is the first one's."""
    tensors: dict[str, str] = {}
    modules: dict[str, str] = {}
    products: dict[str, list[str]] = {}
    for name, site in view.functional.items():
        if site.is_product and site.call.function != VALUES:
            products.setdefault(site.call.modules[0], []).append(name)
        elif site.call.dynamic and not site.is_product:
            modules[site.call.modules[0]] = name
        for tensor in site.call.tensors if not site.call.dynamic else ():
            tensors.setdefault(tensor, name)
    return Places(dict.fromkeys([*view.named, *view.functional]), tensors, modules, products)


def _known(site: Site, macs: dict[str, int] | None) -> int | None:
    calls = macs.get(site.name) if macs else None
    return None if calls == 0 and site.reason else calls  # a fused call may do its work, unseen


def _never_multiplied(name: str, view: View, macs: dict[str, int] | None) -> bool:
    """Whether a bare parameter that a helper function gets is known to be in none of its products."""
    site = view.functional.get(name)
    helped = site is not None and site.call.function == HELPER and name not in view.named
    # without inputs to run on, a vector is taken for none: a scale per head
    return helped and (macs.get(name) == 0 if macs is not None else sum(n > 1 for n in site.weight_shape) < 2)  # type: ignore[union-attr]


def _layer_site(name: str, view: View) -> Site:
    module = view.paths[name]
    weight = module._parameters.get("weight", getattr(module, "weight", None))
    shape = tuple(weight.shape) if isinstance(weight, Tensor) and not _is_lazy(weight) else ()
    channels, reduction = _extent(module, shape)
    functional = view.functional.get(name)
    return Site(
        name=name, kind=type(module).__name__, weight_shape=shape, out_channels=channels, reduction=reduction,
        params=_own_parameters(module), reason=layer_reason(name, module, view),
        call=functional.call if functional is not None else None,
        one_scale=functional.one_scale if functional is not None else "",
    )  # fmt: skip


def _functional_site(name: str, view: View, inside: set[int]) -> Site:
    """A site that is a call; parameters `inside` layers, by identity, are counted there."""
    site = view.functional[name]
    channels, reduction = functional_extent(site)
    params = sum(p.numel() for p in _weights(view, site) if id(p) not in inside)
    return Site(
        name=name, kind=site.kind, weight_shape=site.weight_shape, out_channels=channels, reduction=reduction,
        params=min(params, math.prod(site.weight_shape)) if site.weight_shape else params,
        reason=site.reason, call=site.call,
        one_scale=site.one_scale, nonnegative=site.nonnegative,
    )  # fmt: skip


def functional_extent(site: CallSite) -> tuple[int, int]:
    """Return output channels and products per output element of a site that is a call; zeros where not known."""
    shape, function = site.weight_shape, site.call.function
    if len(shape) < 2:
        return 0, 0
    if function.startswith("conv_transpose"):
        return shape[1] * site.groups, shape[0] // site.groups * math.prod(shape[2:])
    if function.startswith(("conv", "linear")):
        return shape[0], math.prod(shape[1:])
    return (shape[-1], shape[-2]) if site.weight_at == 1 else (shape[-2], shape[-1])


def _weights(view: View, site: CallSite) -> list[Tensor]:
    """Parameters and buffers that a call's weight is computed from."""
    found = []
    for name in site.call.tensors:
        path, _, attribute = name.rpartition(".")
        value = getattr(view.paths.get(path), attribute, None)
        found += [value] if isinstance(value, Tensor) and not _is_lazy(value) else []
    return found


def _own_parameters(module: nn.Module) -> int:
    """Number of parameters of a site, without those of sites inside it."""
    inside = [m for m in module.modules() if m is not module and is_site_type(m)]
    below = {id(p) for m in inside for p in m.parameters()}
    return sum(p.numel() for p in module.parameters() if not _is_lazy(p) and id(p) not in below)


def _extent(module: nn.Module, shape: tuple[int, ...]) -> tuple[int, int]:
    """Output channels and products per output element."""
    if not shape:
        return 0, 0
    groups = int(getattr(module, "groups", 1))
    if getattr(module, "transposed", False):
        return shape[1] * groups, shape[0] // groups * math.prod(shape[2:])
    return shape[0], math.prod(shape[1:])


def _is_lazy(value: Any) -> bool:
    return isinstance(value, UninitializedParameter)


def _state(model: nn.Module) -> list[Tensor]:
    return [t for t in (*model.parameters(), *model.buffers()) if not _is_lazy(t)]


REPLACED = "its forward was replaced on the object itself, so a quantized class would never run"
RECURRENT = "recurrent layer: its products run in one fused kernel"


def layer_reason(name: str, module: nn.Module, view: View) -> str:
    """Return why a layer cannot be converted; empty if it can.

    Args:
        name: The name it goes by.
        module: The layer.
        view: What is seen of the model.
    """
    parent = view.paths.get(name.rpartition(".")[0]) if name else None
    kind, weight = type(module).__name__, getattr(module, "weight", None)
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return RECURRENT
    if "forward" in vars(module):
        return REPLACED
    if any(isinstance(p, UninitializedParameter) for p in module.parameters()):
        return "lazy: its weight has no shape before a first forward"
    if isinstance(parent, nn.MultiheadAttention) and type(parent).forward is not nn.MultiheadAttention.forward:
        return f"{type(parent).__name__} uses its weight without calling it"
    if isinstance(weight, Tensor) and not weight.is_floating_point():
        return f"its weight is {str(weight.dtype).removeprefix('torch.')}"
    if isinstance(weight, Tensor) and weight.numel() == 0:
        return "its weight is empty"
    if name in view.functional:
        return view.functional[name].reason
    if quantized_class(type(module)) is None:
        if name in view.failed:
            return f"{kind} has a forward of its own that torch.fx cannot follow: {view.failed[name]}"
        return f"no quantized form is registered for exactly this class ({kind})"
    return view.read.get(name, "")


def site_notes(view: View) -> dict[str, tuple[str, ...]]:
    """Return remarks for the plan's rows: other names, shared weights, what is never called.

    Args:
        view: What is seen of the model.
    """
    notes: dict[str, list[str]] = {}
    for alias, name in view.aliases.items():
        if alias != name:
            notes.setdefault(name, []).append(f"also named {alias}")
    owners: dict[int, str] = {}
    for path, module in view.paths.items():
        for parameter in module._parameters.values():
            owners.setdefault(id(parameter), view.aliases.get(path, path))
    called = None if view.flow is None else set(view.flow.order)
    for name, module in view.named.items():
        weight = module._parameters.get("weight")
        if weight is not None and owners[id(weight)] != name:
            notes.setdefault(name, []).append(f"shares its weight with {owners[id(weight)] or '(root)'}")
        if called is not None and name not in called and not layer_reason(name, module, view):
            notes.setdefault(name, []).append("not called in evaluation")
    for name, site in view.functional.items():
        if not site.reason and site.call.tensors:
            where = ", ".join(path or "the model" for path in site.call.modules)
            notes.setdefault(name, []).append(f"{site.call.function} called by {where}" if where != name else "")
    return {name: tuple(line for line in lines if line) for name, lines in notes.items()}
