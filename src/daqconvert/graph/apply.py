"""Converting the sites of a plan in a model, to quantized or frozen ones: layers change class, call sites get holders.

The forward of a module that calls a product function is rewritten so that the call goes through the holder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from daqconvert.errors import ConversionError
from daqconvert.graph.call_sites import (
    FUSED,
    CallSite,
    attention_class,
    attention_sites,
    find_call_sites,
    layer_names,
    module_sites,
)
from daqconvert.graph.calls import HELPER
from daqconvert.graph.multiplying import Traced, module_calls, trace_modules
from daqconvert.graph.rewrite import CODES, Rewriting, generate, rewritten_class, weight_function
from daqconvert.layers import call_holders as holders
from daqconvert.layers.attention import PROJECTIONS, SCORES, VALUES, projection_weight, unfused_class
from daqconvert.layers.frozen_site import FrozenSite, empty_values
from daqconvert.layers.functions import channel_layout, output_dims
from daqconvert.layers.integer_layers import fold_before_sum, make_integer, settle_sums
from daqconvert.layers.lookup import frozen_class, quantized_class
from daqconvert.layers.output_quantizers import add_output_quantizer
from daqconvert.layers.site import QuantizedSite
from daqconvert.models import copy_model, evaluating
from daqconvert.quantizers import ChannelLayout
from daqconvert.spec import PlanRow, input_groups

ITSELF = "itself"


def apply_sites(model: nn.Module, rows: Iterable[PlanRow], frozen: bool = False) -> None:
    """Give a float model the sites of a plan, in place.

    Args:
        model: The float model that the plan was made for, or one of the same structure.
        rows: Rows of the plan that are converted.
        frozen: Make frozen sites, whose values are placeholders to be loaded, instead of quantized ones.

    Raises:
        ConversionError: If the model lacks a site of the plan, or a weight cannot be quantized.
    """
    rows = list(rows)
    chosen = {row.name: row for row in rows if not row.site.is_output}
    modules = dict(model.named_modules(remove_duplicate=False))
    calls = _Calls(model, modules, chosen)
    for name, row in chosen.items():
        site = calls.sites.get(name)
        if site is None or (site.call.holder == name and name not in site.call.modules):
            _convert_layer(modules.get(name), row, frozen)
    for one in calls.traced:
        _rewrite(modules[one.path], one, calls, chosen, frozen)
    for site in calls.sites.values():
        if site.name in chosen and site.key[0] in (*PROJECTIONS, SCORES, VALUES):
            _add_projection(modules[site.call.modules[0]], site, chosen[site.name], frozen)
    for module in {id(m): m for m in modules.values()}.values():
        _unfuse(module)
    for row in rows:
        if row.site.is_output:
            add_output_quantizer(model, row, frozen)
    if frozen:
        integer_sites(model, rows, empty=True)


def integer_sites(model: nn.Module, rows: Iterable[PlanRow], empty: bool = False) -> None:
    """Give the frozen layers of integer deployment the numbers to compute with (`IntegerLayer`), in place.

    Args:
        model: A frozen model.
        rows: Rows of its plan.
        empty: Make buffers of zeros, whose values are to be loaded.
    """
    rows = [row for row in rows if row.converted]
    groups = input_groups(rows)
    rows = [row for row in rows if row.site.output is not None]
    layers = [row for row in rows if not row.site.is_output and row.site.output and row.site.output.meets is not None]
    joining = [row for row in rows if row.site.output and row.site.output.joins is not None]
    if not (layers or joining):
        return
    sites = {m.layer_name: m for m in model.modules() if isinstance(m, FrozenSite)}
    if not empty:
        settle_sums(sites, {row.name: row for row in rows}, groups)
    for row in layers:
        make_integer(model, sites, row, empty)
    for row in joining:
        fold_before_sum(model, sites[row.name], row, empty)


class _Calls:
    """The call sites that the chosen rows name, found by tracing this model.

    Attributes:
        sites: Name -> call site.
        traced: Modules that make the calls.
        names: Any dotted name of a layer -> its site name (the first of its names).
        written: Key of everything that generated forwards depend on -> the forwards; equal modules share them.
    """

    def __init__(self, model: nn.Module, modules: dict[str, nn.Module], chosen: dict[str, PlanRow]) -> None:
        self.sites: dict[str, CallSite] = {}
        self.traced: list[Traced] = []
        self.names: dict[str, str] = {}
        self.written: dict[Any, Rewriting] = {}
        needed = {path for row in chosen.values() if row.site.call is not None for path in row.site.call.modules}
        if not needed:
            return
        copy = copy_model(model, to_look_at=True)  # while it is traced, a module's code may store what it gets
        paths = dict(copy.named_modules(remove_duplicate=False))
        self.names = layer_names(paths)
        with evaluating(copy):
            self.traced, _ = trace_modules({path: module for path, module in paths.items() if path in needed})
            found = (*find_call_sites(self.traced, self.names), *attention_sites(paths))
        self.sites = {site.name: site for site in found if site.name in chosen}
        for name, row in chosen.items():
            if row.site.call is not None and (name not in self.sites or self.sites[name].call != row.site.call):
                raise ConversionError(
                    f"{name}: expected {row.site.call.function} called by {', '.join(row.site.call.modules)}, found "
                    "no such call: the library's code differs from the one that this plan was made with."
                )


def _convert_layer(layer: nn.Module | None, row: PlanRow, frozen: bool) -> None:
    cls = quantized_class(type(layer)) if layer is not None else None
    if layer is None or cls is None or row.settings is None:
        raise ConversionError(f"{row.name}: no quantized form is registered for {type(layer).__name__}.")
    if frozen:
        frozen_class(type(layer)).skeleton(layer, row.settings, row.name)
    else:
        cls.convert(layer, row.settings, row.name, row.signed)


def _rewrite(module: nn.Module, one: Traced, calls: _Calls, chosen: dict[str, PlanRow], frozen: bool) -> None:
    """Give one module a generated forward, and add the holders of its calls."""
    places: dict[tuple[Any, ...], str] = {}
    with_codes: set[str] = set()
    own: tuple[CallSite, Any] | None = None
    prefix = f"{one.path}." if one.path else ""
    by_key = {site.key: site for site in module_sites(one, calls.names) if site.name in chosen}
    for key, call, variant in module_calls(one):
        site = by_key.get(key)
        if site is None:
            continue
        weight_of = None if call.dynamic else weight_function(variant.graph, call.weight)
        if site.call.holder == one.path:
            own, places[key] = (site, weight_of), ITSELF
        else:
            is_layer = site.call.holder == site.name  # this module may have another name for the layer
            places[key] = call.raw.rpartition(".")[0] if is_layer else site.call.holder.removeprefix(prefix)
            if not is_layer:
                _add_holder(module, places[key], site, chosen[site.name], weight_of, frozen)
        kept = call.dynamic or (call.function == HELPER and not is_layer)  # the function may read the weight, too
        if chosen[site.name].settings.w_bits is not None and not kept:  # type: ignore[union-attr]
            with_codes.add(places[key])
    if not places:
        return
    original = type(module)
    alike = (original, id(one.variants), frozenset(places.items()), frozenset(with_codes))
    if alike not in calls.written:
        calls.written[alike] = generate(original, one, places, frozenset(with_codes))
    rewriting = dataclasses.replace(calls.written[alike], layer_name=one.path)
    if own is not None:
        _make_own(module, original, *own, chosen[own[0].name], frozen, tuple(rewriting.methods))
    else:
        module.__class__ = rewritten_class(original, (), "Rewritten", tuple(rewriting.methods))
    module.rewriting = rewriting.frozen() if frozen else rewriting  # type: ignore[assignment] # no module
    if frozen:
        rewriting.drop_unused(module)


def _layout(site: CallSite, row: PlanRow) -> ChannelLayout | None:
    """Return where the output channels of a call's weight are; None for a weight that depends on data.

    If the position is not known, the site has one scale for all channels, and any layout gives the same result.
    """
    if site.call.dynamic:
        return None
    shape = site.weight_shape
    return channel_layout(site.call.function, site.weight_at, shape, site.groups) or ChannelLayout.forward(shape)


def _add_holder(module: nn.Module, place: str, site: CallSite, row: PlanRow, weight_of: Any, frozen: bool) -> None:
    """Add the module that holds the quantizers or codes of a call, at `place` in the module that makes the call."""
    owner, _, name = place.rpartition(".")
    parent = module.get_submodule(owner)
    if name in parent._modules:
        return
    holder = holders.FrozenCallHolder() if frozen else holders.CallHolder()
    holder.train(module.training and not frozen)
    holder.output_dims = output_dims(site.call.function)
    weight = _weight(module, weight_of)
    if isinstance(holder, holders.CallHolder):
        holder.source = None if weight_of is None else (module, weight_of)
        assert row.settings is not None
        holder.attach(row.settings, row.name, row.signed, weight, _layout(site, row))
    else:
        _hold(holder, site, row, weight)
    parent.add_module(name, holder)


def _make_own(
    module: Any, original: type[nn.Module], site: CallSite, weight_of: Any, row: PlanRow, frozen: bool,
    methods: tuple[str, ...],
) -> None:  # fmt: skip
    """Make a rewritten module the holder of the quantizers of its own weight; if frozen, a child holds the codes."""
    weight = _weight(module, weight_of)
    assert row.settings is not None
    if frozen:
        module.__class__ = rewritten_class(original, (), "Frozen", methods)
        codes = holders.FrozenCallHolder().eval()
        codes.output_dims = output_dims(site.call.function)
        _hold(codes, site, row, weight)
        module.add_module(CODES, codes)
    else:
        module.output_dims = output_dims(site.call.function)
        module.__class__ = rewritten_class(original, (holders.OwnCallHolder,), "Quant", methods)
        module.weight_of = weight_of
        module.attach(row.settings, row.name, row.signed, weight, _layout(site, row))


def _add_projection(module: Any, site: CallSite, row: PlanRow, frozen: bool) -> None:
    """Give an attention block the holder of a projection or product."""
    part = str(site.key[0])
    weight_of = partial(projection_weight, projection=part) if part in PROJECTIONS else None
    _add_holder(module, f"{part}_site", site, row, weight_of, frozen)
    if frozen:
        drop_projection_weights(module)


def drop_projection_weights(module: Any) -> None:
    """Remove the weights of an attention block's projections that have codes."""
    with_codes = {
        p for p in PROJECTIONS if "weight_codes" in getattr(module._modules.get(f"{p}_site"), "_buffers", ())
    }
    if with_codes == {*PROJECTIONS} and module.in_proj_weight is not None:
        module.in_proj_weight = None
    for projection in with_codes if module.in_proj_weight is None else ():
        setattr(module, f"{projection}_weight", None)


def _hold(holder: FrozenSite, site: CallSite, row: PlanRow, weight: Tensor) -> None:
    assert row.settings is not None
    holder.hold(row.settings, row.name, weight.dtype, empty_values(row.settings, weight, _layout(site, row)))


@torch.no_grad()
def _weight(module: nn.Module, weight_of: Any) -> Tensor:
    """Return the float weight; for one that depends on data, an empty tensor of the module's dtype and device."""
    if weight_of is not None:
        found: Tensor = weight_of(module)
        return found
    like = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))
    return torch.empty(0, dtype=like.dtype, device=like.device)


def _unfuse(module: nn.Module) -> None:
    """Keep a module of torch from taking a fused path that would bypass the sites inside."""
    if not isinstance(module, (nn.MultiheadAttention, *FUSED)):
        return
    if not any(isinstance(m, (QuantizedSite, FrozenSite)) for m in module.modules()):
        return
    if isinstance(module, nn.MultiheadAttention):
        module.__class__ = attention_class(type(module)) or type(module)
    else:
        module.__class__ = unfused_class(type(module))
