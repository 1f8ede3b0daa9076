"""The list of a model's sites: everything that convolves or multiplies by a weight, convertible or not.

A site is a layer, found by a walk of the module tree, or a call site, found by tracing the modules that may multiply.
A site that cannot be converted has a `reason`. More facts about a site come from the dataflow of the whole model, if
torch.fx can follow it, and from a dry run that counts multiply-accumulates (MACs).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from daqconvert.graph.call_sites import (
    CallSite,
    attention_sites,
    find_call_sites,
    hidden_site,
    layer_extent,
    layer_names,
    unseen_sites,
)
from daqconvert.graph.calls import HELPER, Read, find_reads, multiplying_site
from daqconvert.graph.flow import Flow, above, entries, read_flow
from daqconvert.graph.multiplying import trace_modules
from daqconvert.graph.output_flow import OutputFlow
from daqconvert.graph.signs import is_hooked
from daqconvert.graph.trace import in_sequence, trace
from daqconvert.layers.attention import PROJECTIONS, SCORES, VALUES
from daqconvert.layers.lookup import quantized_class
from daqconvert.layers.registry import is_site_type
from daqconvert.macs import Event, Places, count_macs, example_arguments
from daqconvert.models import copy_model, evaluating
from daqconvert.spec import Site

REPLACED = "its forward was replaced on the object itself, so a quantized class would never run"
RECURRENT = "recurrent layer: its products run in one fused kernel"


@dataclass(frozen=True)
class Found:
    """The sites of a model, and facts about the model as a whole.

    Attributes:
        sites: The sites in order of execution if fx could follow the model, else in order of registration.
        order: Which of the two orders `sites` has: `"fx"` (execution) or `"modules"` (registration).
        other_params: Number of elements of the parameters and buffers outside the sites.
        input_size: Size of the example input that the MACs are counted with; None if they are not counted.
        outputs: Facts about sums of the sites' outputs, what is concatenated, and operators between the sites.
    """

    sites: tuple[Site, ...]
    order: str
    other_params: int
    input_size: tuple[int, ...] | None
    outputs: OutputFlow


def find_sites(model: nn.Module, example_inputs: Any = None) -> Found:
    """Find every site of a model, with a reason for each site that cannot be converted.

    Args:
        model: Any module, on any device; not changed.
        example_inputs: A tensor, a tuple of positional or a dict of keyword arguments, to count MACs with. If None,
            the input size that a timm model states is used, and the MACs of any other model stay unknown.

    Raises:
        ConversionError: If the model cannot be copied, or cannot run on the example inputs.
    """
    hooked = frozenset(name for name, m in model.named_modules(remove_duplicate=False) if is_hooked(m))
    model = copy_model(model, to_look_at=True)  # its own code runs below and may store what it gets
    args, kwargs, size = example_arguments(model, example_inputs)
    required = example_inputs is not None
    view = _look(model, (len(args), frozenset(kwargs)) if required else None, hooked)
    macs = _macs(model, view, args, kwargs, required) if size is not None else None
    (first, last), notes = _ends(view), _notes(view)
    order = [name for name in _ordered(view) if not _never_multiplied(name, view, macs)]
    inside = {id(p) for module in view.named.values() for p in module.parameters()}
    sites = [_layer_site(name, view) if name in view.named else _call_site(name, view, inside) for name in order]
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
    inside |= {id(p) for site in view.calls.values() for p in _weights(view, site)}
    others = sum(t.numel() for t in _state(model) if id(t) not in inside)
    order_by = "fx" if view.flow else "modules"
    return Found(tuple(known), order_by, others, size if macs is not None else None, outputs)


@dataclass(frozen=True)
class _View:
    """All that the walk and the traces of a model found.

    Attributes:
        paths: Any dotted name -> module.
        aliases: Any dotted name of a layer -> its site name (the first of its names).
        flow: The dataflow of the whole model; None if fx cannot follow the model.
        calls: Name -> call site.
        failed: Name of a module whose own forward may multiply and that fx cannot follow -> the reason.
        bypassed: Name of a layer -> the reason not to convert it: its weight is used, without a call of the layer, by
            a forward that cannot be rewritten; or the layer makes or shares the weight of a call site.
    """

    paths: dict[str, nn.Module]
    aliases: dict[str, str]
    flow: Flow | None
    calls: dict[str, CallSite]
    failed: dict[str, str]
    bypassed: dict[str, str]

    @property
    def named(self) -> dict[str, nn.Module]:
        """Layers, in order of registration."""
        return {name: self.paths[name] for name in dict.fromkeys(self.aliases.values())}


def _look(
    model: nn.Module, given: tuple[int, frozenset[str]] | None = None, hooked: frozenset[str] = frozenset()
) -> _View:
    """Walk the modules of a model, trace the model, and trace separately every module whose forward may multiply.

    The model should be a copy of the user's, because its code runs here with proxies and may keep them. `given` is the
    number of positional arguments and the names of keyword arguments; None for the arguments without a default.
    `hooked` are the modules whose inputs or outputs hooks of the user's model may change; the copy has no hooks.
    """
    paths = dict(model.named_modules(remove_duplicate=False))
    aliases = layer_names(paths)
    with evaluating(model):
        traced, failed = trace_modules(paths, every=False)
        sites = {site.name: site for site in (*find_call_sites(traced, aliases), *attention_sites(paths))}
        graph = trace(model, given) if "" not in aliases else None
        if graph is not None:
            in_sequence(graph, paths)
        reads = find_reads(graph, model) if graph is not None else []
    owners = _owners(paths, aliases, sites)
    calls: list[tuple[Read, str]] = []
    bypassed: dict[str, str] = {}
    places = {path: i for i, path in enumerate(failed)}
    for read in reads:
        names = owners.get(id(model.get_parameter(read.tensor)), [])
        calls += [(read, name) for name in multiplying_site(read, reads, [n for n in names if n in sites] or names)]
        for name in names:
            maker = min((path for path in above(name) if path in failed), key=places.__getitem__, default=None)
            if name not in sites and maker is not None:
                bypassed[name] = f"{maker or 'the model'} uses its weight without calling it: {failed[maker]}"
    for path, why in failed.items():
        for name, site in unseen_sites(path, paths[path], why, aliases):
            if name not in sites and isinstance(site, str):
                bypassed.setdefault(name, site)
            elif isinstance(site, CallSite):
                sites.setdefault(name, site)
    bypassed |= _making(sites, aliases)
    if "" in aliases:  # the root itself is a layer, and fx would trace into it
        flow: Flow | None = Flow((aliases[""],), frozenset({""}), frozenset({""}))
    else:
        known = _in_order(paths, aliases, sites)
        flow = None if graph is None else read_flow(graph, paths, known, calls, _indirect(sites), hooked)
    bypassed = _never_called(sites, aliases, flow) | bypassed
    return _View(paths, aliases, flow, sites, failed, bypassed)


def _making(sites: dict[str, CallSite], aliases: dict[str, str]) -> dict[str, str]:
    """Return the layers that are called to make the weight of a call site, each with the reason not to convert it.

    The weight is quantized as a whole; a quantized maker would round it twice, and its input is no data that
    `calibrate` sees. Call sites inside such a module get the same reason, in `sites`.
    """
    found: dict[str, str] = {}
    for site in list(sites.values()):
        for maker in site.makers if not site.reason else ():
            why = f"makes the weight of {site.name}, which is quantized as a whole"
            found |= {name: why for alias, name in aliases.items() if maker in (alias, *above(alias))}
            for name, inside in sites.items():
                if inside is not site and any(maker in (path, *above(path)) for path in inside.call.modules):
                    sites[name] = dataclasses.replace(inside, reason=inside.reason or why)
    return found


def _never_called(sites: dict[str, CallSite], aliases: dict[str, str], flow: Flow | None) -> dict[str, str]:
    """Return the layers that are never called while their weights are part of a call site's, each with this reason."""
    found: dict[str, str] = {}
    for site in sites.values() if flow is not None else ():
        for tensor in site.call.tensors if not site.reason else ():
            layer = aliases.get(tensor.removesuffix(".weight"), site.name)
            if layer not in (site.name, *flow.order):  # type: ignore[union-attr]
                found.setdefault(layer, f"never called: its weight is part of that of {site.name}")
    return found


def _in_order(paths: dict[str, nn.Module], aliases: dict[str, str], sites: dict[str, CallSite]) -> dict[str, str]:
    """Return a dict: any dotted name of a site -> its site name; calls of an attention block precede `out_proj`."""
    known: dict[str, str] = {}
    made: dict[str, list[str]] = {}
    for name, site in sites.items():
        for path in dict.fromkeys(site.call.modules):
            made.setdefault(path, []).append(name)
    for alias, name in aliases.items():
        block = alias.rpartition(".")[0]
        if isinstance(paths.get(block), nn.MultiheadAttention):
            known |= {inside: inside for inside in made.get(block, ())}
        known[alias] = name
    return known | {name: name for name in sites}


def _owners(paths: dict[str, nn.Module], aliases: dict[str, str], sites: dict[str, CallSite]) -> dict[int, list[str]]:
    """Return a dict: `id` of a parameter -> the names of the sites that multiply by it, call sites first."""
    owners: dict[int, list[str]] = {}
    for name, site in sites.items():
        for tensor in site.call.tensors:
            path, _, attribute = tensor.rpartition(".")
            parameter = paths[path]._parameters.get(attribute) if path in paths else None
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)
    for name in dict.fromkeys(aliases.values()):
        for parameter in paths[name]._parameters.values():
            if parameter is not None and name not in owners.get(id(parameter), ()):
                owners.setdefault(id(parameter), []).append(name)
    return owners


def _indirect(sites: dict[str, CallSite]) -> frozenset[str]:
    """Return the sites about whose input nothing is proven: a forward may change it, or another method has its own."""
    inside = (site for site in sites.values() if site.call.holder in site.call.modules)
    return frozenset(site.name for site in inside if not site.direct) | {s.name for s in sites.values() if s.in_method}


def _ends(view: _View) -> tuple[frozenset[str], frozenset[str]]:
    """Return the first and the last sites: from the dataflow if it is known, else the ends of the module order."""
    if view.flow is not None:
        return view.flow.first, view.flow.last
    layers = {name for name, module in view.named.items() if not _layer_reason(name, module, view)}
    names = [n for n in _ordered(view) if n in layers or (n in view.calls and _is_projection(view.calls[n]))]
    return frozenset(entries(names)), frozenset(names[-1:])


def _ordered(view: _View) -> list[str]:
    """Return the names of sites in order of execution if fx could follow the model, else in order of registration.

    A call site that the dataflow does not contain comes after the other sites of its module.
    """
    known = dict.fromkeys([*(view.flow.order if view.flow else ()), *view.named])
    before: dict[str, list[str]] = {}
    late: list[tuple[str, str]] = []
    for name, site in view.calls.items():
        out = f"{name.rpartition('.')[0]}.out_proj".lstrip(".")
        if name not in known and _in_attention(site, view) and out in known:
            before.setdefault(out, []).append(name)
        elif name not in known:
            late.append((name, site.call.modules[0]))
    return _behind([n for name in known for n in (*before.get(name, ()), name)], late)


def _behind(order: list[str], late: list[tuple[str, str]]) -> list[str]:
    """Insert each late name, given with the module that contains it, behind the last name inside that module.

    If the module has no other name in `order`, the late name comes last.
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


def _in_attention(site: CallSite, view: _View) -> bool:
    """Whether a call site is in one of torch's attention blocks, which make all their calls before `out_proj`."""
    return isinstance(view.paths[site.call.modules[0]], nn.MultiheadAttention)


def _macs(
    model: nn.Module, view: _View, args: tuple[Any, ...], kwargs: dict[str, Any], required: bool
) -> dict[str, int] | None:
    """Return the MACs of every site, None if the forward cannot run; add what no trace shows to `view.calls`."""
    unplaced: list[Event] = []
    macs = count_macs(model, _places(view), args, kwargs, required=required, unplaced=unplaced)
    if macs is None:
        return macs
    for event in unplaced:
        view.calls.setdefault(event.tensors[0], hidden_site(event, view.paths))
        macs[event.tensors[0]] = macs.get(event.tensors[0], 0) + event.macs
    for values, site in view.calls.items():
        if site.is_product and site.call.function == VALUES:  # counted with its scores, by one fused function
            scores = values.replace(VALUES, SCORES)
            macs |= {scores: macs[scores] // 2, values: macs[scores] - macs[scores] // 2}
    parts: dict[str, list[str]] = {}
    for name, site in view.calls.items():
        for tensor in site.call.tensors if not site.call.dynamic else ():
            parts.setdefault(tensor, []).append(name)
    for whole, *others in parts.values():
        if others and not any(macs[name] for name in others):  # one product by the whole tensor, shared by its parts
            sizes = {name: math.prod(view.calls[name].weight_shape) for name in (whole, *others)}
            total = max(sum(sizes.values()), 1)
            macs |= {name: macs[whole] * size // total for name, size in sizes.items()}
    return macs


def _places(view: _View) -> Places:
    """Return where the sites of a model multiply; a tensor that several sites use parts of is the first site's."""
    tensors: dict[str, str] = {}
    modules: dict[str, str] = {}
    products: dict[str, list[str]] = {}
    for name, site in view.calls.items():
        if site.is_product and site.call.function != VALUES:
            products.setdefault(site.call.modules[0], []).append(name)
        elif site.call.dynamic and not site.is_product:
            modules[site.call.modules[0]] = name
        for tensor in site.call.tensors if not site.call.dynamic else ():
            tensors.setdefault(tensor, name)
    return Places(dict.fromkeys([*view.named, *view.calls]), tensors, modules, products)


def _known(site: Site, macs: dict[str, int] | None) -> int | None:
    calls = macs.get(site.name) if macs else None
    return None if calls == 0 and site.reason else calls  # a fused call may do its products uncounted


def _never_multiplied(name: str, view: _View, macs: dict[str, int] | None) -> bool:
    """Whether a site is a bare parameter that a helper function gets but does not multiply by."""
    site = view.calls.get(name)
    helped = site is not None and site.call.function == HELPER and name not in view.named
    # without a count of MACs, a vector is taken to be a scale (for example one per head), not a weight
    return helped and (macs.get(name) == 0 if macs is not None else sum(n > 1 for n in site.weight_shape) < 2)  # type: ignore[union-attr]


def _layer_site(name: str, view: _View) -> Site:
    module = view.paths[name]
    weight = module._parameters.get("weight", getattr(module, "weight", None))
    shape = tuple(weight.shape) if isinstance(weight, Tensor) and not _is_lazy(weight) else ()
    channels, reduction = layer_extent(module, shape)
    call_site = view.calls.get(name)
    return Site(
        name=name, kind=type(module).__name__, weight_shape=shape, out_channels=channels, reduction=reduction,
        params=_own_parameters(module), reason=_layer_reason(name, module, view),
        call=call_site.call if call_site is not None else None,
        one_scale=call_site.one_scale if call_site is not None else "",
    )  # fmt: skip


def _call_site(name: str, view: _View, inside: set[int]) -> Site:
    """Return the facts of a call site; `inside` are the `id`s of parameters that are already counted with a layer."""
    site = view.calls[name]
    channels, reduction = site.extent
    params = sum(p.numel() for p in _weights(view, site) if id(p) not in inside)
    return Site(
        name=name, kind=site.kind, weight_shape=site.weight_shape, out_channels=channels, reduction=reduction,
        params=min(params, math.prod(site.weight_shape)) if site.weight_shape else params,
        reason=site.reason, call=site.call,
        one_scale=site.one_scale, nonnegative=site.nonnegative,
    )  # fmt: skip


def _weights(view: _View, site: CallSite) -> list[Tensor]:
    """Return the parameters and buffers that a call's weight is computed from."""
    found = []
    for name in site.call.tensors:
        path, _, attribute = name.rpartition(".")
        value = getattr(view.paths.get(path), attribute, None)
        found += [value] if isinstance(value, Tensor) and not _is_lazy(value) else []
    return found


def _own_parameters(module: nn.Module) -> int:
    """Return the number of parameters of a site, without those of sites inside it."""
    inside = [m for m in module.modules() if m is not module and is_site_type(m)]
    below = {id(p) for m in inside for p in m.parameters()}
    return sum(p.numel() for p in module.parameters() if not _is_lazy(p) and id(p) not in below)


def _is_lazy(value: Any) -> bool:
    return isinstance(value, UninitializedParameter)


def _state(model: nn.Module) -> list[Tensor]:
    return [t for t in (*model.parameters(), *model.buffers()) if not _is_lazy(t)]


def _layer_reason(name: str, module: nn.Module, view: _View) -> str:
    """Return why a layer cannot be converted; empty if it can."""
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
    if name in view.calls:
        return view.calls[name].reason
    if quantized_class(type(module)) is None:
        if name in view.failed:
            return f"{kind} has a forward of its own that torch.fx cannot follow: {view.failed[name]}"
        return f"no quantized form is registered for exactly this class ({kind})"
    return view.bypassed.get(name, "")


def _notes(view: _View) -> dict[str, tuple[str, ...]]:
    """Return remarks for the plan's rows: other names, shared weights, callers, layers that are never called."""
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
        if called is not None and name not in called and not _layer_reason(name, module, view):
            notes.setdefault(name, []).append("not called in evaluation")
    for name, site in view.calls.items():
        if not site.reason and site.call.tensors:
            where = ", ".join(path or "the model" for path in site.call.modules)
            notes.setdefault(name, []).append(f"{site.call.function} called by {where}" if where != name else "")
    return {name: tuple(line for line in lines if line) for name, lines in notes.items()}
