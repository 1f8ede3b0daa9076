"""Finding call sites (products that a forward computes itself, not by calling a layer), their names and holders.

What multiplies                         Holder of the quantizers
F.linear(x, self.qkv.weight)            the layer `qkv`, as if it had been called
forward of a subclass of nn.Conv2d      the module itself, if the weight is computed from its own `weight`
F.conv2d(x, self.kernel)                a new module next to the parameter: `kernel_site`
q @ k.transpose(-2, -1)                 a new child of the module that multiplies: `matmul_site`
nn.MultiheadAttention                   new children for its input projections and its two products: `q_proj_site`, ...
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import UninitializedParameter

from daqconvert.graph.calls import HELPER, ProductCall, call_name, find_calls, keyed
from daqconvert.graph.multiplying import Traced, method_variants, module_calls
from daqconvert.graph.rewrite import ancestors, weight_function
from daqconvert.graph.scan import may_multiply, read_weights
from daqconvert.graph.variants import Variant
from daqconvert.layers.attention import PROJECTIONS, SCORES, VALUES, QuantMultiheadAttention, projection_weight
from daqconvert.layers.frozen_site import FrozenSite
from daqconvert.layers.functions import FUNCTIONS, LAYER_FUNCTIONS, NAMES, channel_layout, has_columns
from daqconvert.layers.lookup import quantized_class
from daqconvert.layers.registry import is_site_type
from daqconvert.layers.site import QuantizedSite
from daqconvert.macs import Event
from daqconvert.quantizers import ChannelLayout
from daqconvert.spec import Call

FEWEST_PER_COLUMN = 16
"""A matrix product gets a scale per channel only if each output channel has at least this many weights."""
FUSED = (nn.TransformerEncoderLayer, nn.TransformerEncoder)
"""Modules of torch with a fused path that bypasses the sites inside."""
_ATTENTION_CLASSES: dict[type[nn.MultiheadAttention], type[nn.MultiheadAttention]] = {}
USED = "multiplies by it, which no forward calls, so that calibration would see nothing"
FIXED_FILTER = "a fixed filter: a buffer, which no training changes"


@dataclass(frozen=True)
class CallSite:
    """One site that is a function call.

    Attributes:
        name: Name of the site.
        kind: Class name of the layer that is the holder; if the holder is not a layer, name of the function.
        call: What the plan says about the call.
        key: Key of the call in each module that makes it, from `calls.keyed`.
        weight_shape: Shape of the weight; empty if the weight depends on data.
        groups: Groups of a transposed convolution; 1 if they are not known, and for any other function.
        weight_at: Which operand is the weight, 0 or 1.
        reason: Why the site cannot be converted; empty if it can.
        one_scale: Why the site cannot have a scale per channel; empty if it can.
        direct: Whether the site's input is an argument of the forward, unchanged or padded.
        in_method: Whether another method than a forward computes the site, too.
        nonnegative: Whether the site's input is known to be non-negative, as the probabilities of attention are.
        makers: Dotted names of the modules that are called to make the weight.
    """

    name: str
    kind: str
    call: Call
    key: tuple[Any, ...]
    weight_shape: tuple[int, ...] = ()
    groups: int = 1
    weight_at: int = 1
    reason: str = ""
    one_scale: str = ""
    direct: bool = False
    in_method: bool = False
    nonnegative: bool = False
    makers: tuple[str, ...] = ()

    @property
    def is_product(self) -> bool:
        """Whether both operands are activations."""
        return self.call.is_product

    @property
    def extent(self) -> tuple[int, int]:
        """Number of output channels, and of products in one output element; zeros if not known."""
        shape, function = self.weight_shape, self.call.function
        if len(shape) < 2:
            return 0, 0
        if function.startswith("conv_transpose"):
            return shape[1] * self.groups, shape[0] // self.groups * math.prod(shape[2:])
        if function.startswith(("conv", "linear")):
            return shape[0], math.prod(shape[1:])
        return (shape[-1], shape[-2]) if has_columns(function, self.weight_at) else (shape[-2], shape[-1])


def layer_names(paths: dict[str, nn.Module]) -> dict[str, str]:
    """Return a dict from every dotted name of a layer to its site name, which is the first of its names."""
    own: dict[int, str] = {}
    for name, module in paths.items():
        if is_site_type(module) or isinstance(module, (QuantizedSite, FrozenSite)):
            own.setdefault(id(module), name)
    return {name: own[id(module)] for name, module in paths.items() if id(module) in own}


def layer_extent(module: nn.Module, shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the number of output channels and of products per output element; zeros if the shape is unknown."""
    if not shape:
        return 0, 0
    groups = int(getattr(module, "groups", 1))
    if getattr(module, "transposed", False):
        return shape[1] * groups, shape[0] // groups * math.prod(shape[2:])
    return shape[0], math.prod(shape[1:])


def find_call_sites(traced: list[Traced], aliases: dict[str, str]) -> list[CallSite]:
    """Return the call sites of traced modules, each once, in order of the modules.

    `aliases` maps any dotted name of a layer to its site name (`layer_names`).
    """
    found: dict[str, CallSite] = {}
    for one in traced:
        for site in module_sites(one, aliases):
            known = found.get(site.name)
            found[site.name] = site if known is None else _merged(known, site)
    return list(found.values())


def _merged(one: CallSite, other: CallSite) -> CallSite:
    """Return the site of two calls that share a holder, with the reasons for what cannot be done with both."""
    modules = tuple(dict.fromkeys((*one.call.modules, *other.call.modules)))
    reasons = one.reason, other.reason
    reason = next((r for r in reasons if r and not r.endswith(USED)), "" if "" in reasons else one.reason)
    if not reason and not (one.key[1] and other.key[1]):
        where = " and ".join(path or "the model" for path in modules)
        reason = f"{where} compute different weights from it, which cannot share one set of quantizers"
    one_scale, functions = one.one_scale or other.one_scale, (one.call.function, other.call.function)
    if not one_scale and HELPER not in functions and _layout_of(one) != _layout_of(other):
        one_scale = f"one scale: {' and '.join(functions)} have their channels along different axes"
    return replace(
        one, call=replace(one.call, modules=modules), reason=reason, one_scale=one_scale,
        direct=one.direct and other.direct, in_method=one.in_method or other.in_method,
        nonnegative=one.nonnegative and other.nonnegative, makers=tuple(sorted({*one.makers, *other.makers})),
    )  # fmt: skip


def _layout_of(site: CallSite) -> ChannelLayout | None:
    shape = site.weight_shape
    return channel_layout(site.call.function, site.weight_at, shape, site.groups) if len(shape) > 1 else None


def unseen_sites(
    path: str, module: nn.Module, why: str, aliases: dict[str, str]
) -> Iterator[tuple[str, CallSite | str]]:
    """Yield a name and a finding for each matrix that the forward of a module reads, if fx cannot follow this forward.

    For a bare parameter the finding is a `CallSite` with a reason not to convert it. For a layer whose weight is read,
    the finding is the reason not to convert the layer. `path` is the name of the module, `why` the message of fx, and
    `aliases` maps any dotted name of a layer to its site name (`layer_names`).
    """
    for tensor in sorted(read_weights(module)):
        name = _join(path, tensor)
        owner, _, attribute = name.rpartition(".")
        if attribute == "weight" and owner in aliases and owner != path:
            yield aliases[owner], f"{path or 'the model'} uses its weight without calling it: {why}"
        elif owner not in aliases:
            call = Call("parameter", (path,), f"{name}_site", (name,))
            shape = tuple(module.get_parameter(tensor).shape)
            reason = f"a bare parameter of {path or 'the model'}, whose forward torch.fx cannot follow: {why}"
            yield name, CallSite(name, "parameter", call, ("unseen",), shape, reason=reason)


def hidden_site(event: Event, paths: dict[str, nn.Module]) -> CallSite:
    """Return the site, with a reason, of a product that ran with a parameter and that no trace shows."""
    owner, _, attribute = event.tensors[0].rpartition(".")
    weight = getattr(paths.get(owner), attribute, None)
    shape = tuple(weight.shape) if isinstance(weight, Tensor) else ()
    call = Call(event.op, (event.module,), f"{event.tensors[0]}_site", event.tensors[:1])
    place = f"{event.op} in {event.module or 'the model'} multiplies by it ({event.where})"
    reason = f"{place}, where torch.fx cannot see it"
    return CallSite(event.tensors[0], event.op, call, ("unseen",), shape, reason=reason)


def module_sites(one: Traced, aliases: dict[str, str]) -> Iterator[CallSite]:
    """Yield the site of each different call of a module; calls that share a holder have sites of the same name."""
    taken: set[str] = set()
    of_forward, of_methods = (
        {key for variant in variants for key, _ in keyed(find_calls(variant.graph, one.module))}
        for variants in (one.variants, method_variants(one))
    )
    for key, call, variant in module_calls(one):
        name, holder, kind = _name(one, call, aliases, taken)
        taken.add(holder)
        tensors = tuple(_join(one.path, t) for t in call.tensors)
        site = CallSite(name, kind, Call(call.function, (one.path,), holder, tensors, call.dynamic), key)
        site = replace(site, in_method=bool(call.tensors) and key in of_methods)
        probabilities = call.function == VALUES
        site = replace(site, weight_at=call.weight_at, direct=_is_direct(call), nonnegative=probabilities)
        site = replace(site, makers=tuple(sorted({_join(one.path, str(node.target)) for node in _makers(call)})))
        site = _described(site, one, call, variant)
        called = holder == name != one.path  # a layer, which the forward calls
        if key not in of_forward and not site.reason and not called:
            site = replace(site, reason=f"only {' and '.join(one.methods)} of {one.path or 'the model'} {USED}")
        yield site


def _makers(call: ProductCall) -> list[fx.Node]:
    """Return the calls of modules that make the weight of a call; none if the weight depends on data."""
    found = ancestors(call.weight) if call.tensors and not call.dynamic else ()
    return [node for node in found if node.op == "call_module"]


def _is_direct(call: ProductCall) -> bool:
    x = call.node.args[0] if call.node.args else call.node.kwargs.get("input")
    if isinstance(x, fx.Node) and x.op == "call_function" and call_name(x) in ("pad", "pad_same"):
        x = x.args[0]
    return isinstance(x, fx.Node) and x.op == "placeholder"


def _name(one: Traced, call: ProductCall, aliases: dict[str, str], taken: set[str]) -> tuple[str, str, str]:
    """Return the name, the holder and the kind of a call site; `taken` are the holders that the module has already."""
    owner, _, tensor = call.raw.rpartition(".")
    child = one.module.get_submodule(owner) if owner else one.module
    layered = call.function in LAYER_FUNCTIONS or call.function == HELPER
    if owner and tensor == "weight" and layered and quantized_class(type(child)) is not None:
        name = aliases.get(_join(one.path, owner), _join(one.path, owner))
        return name, name, type(child).__name__
    own = "weight" in call.tensors and call.function in LAYER_FUNCTIONS
    if own and is_site_type(one.module) and one.path not in taken:
        name = aliases.get(one.path, one.path)
        return name, one.path, type(one.module).__name__
    base = max(call.tensors, key=lambda t: _numel(one.module, t)) if call.tensors else call.function
    for node in _makers(call):  # a module that multiplies by this tensor itself has a site of its name
        target = str(node.target)
        if base.startswith(f"{target}.") and node.args and may_multiply(type(one.module.get_submodule(target))):
            base = base if quantized_class(type(one.module.get_submodule(target))) else f"{target}.made"
    base = _join(one.path, base)
    number = next(i for i in itertools.count(1) if f"{base}_site{_suffix(i)}" not in taken)
    return f"{base}{f'#{number}' if number > 1 else ''}", f"{base}_site{_suffix(number)}", call.function


def _suffix(number: int) -> str:
    return f"_{number}" if number > 1 else ""


def _described(site: CallSite, one: Traced, call: ProductCall, variant: Variant) -> CallSite:
    """Return the site completed by its shape and groups, and by the reasons for what cannot be done with it."""
    if call.function not in FUNCTIONS and call.function not in (HELPER, SCORES, VALUES):
        shape = _raw_shape(one.module, call) if call.tensors else ()
        return replace(site, reason=f"no quantized form of {call.function}", weight_shape=shape)
    if call.function == HELPER:
        site = replace(site, weight_shape=_raw_shape(one.module, call))
        told = f"one scale: {call_name(call.node)} gets it, where torch.fx cannot follow"
        return site if site.call.holder == site.name else replace(site, one_scale=told)
    if not call.tensors:
        return site
    if not call.is_parameter(one.module):
        return replace(site, reason=FIXED_FILTER, weight_shape=_raw_shape(one.module, call))
    if call.dynamic:
        return site
    try:
        with torch.no_grad():
            weight = weight_function(variant.graph, call.weight)(one.module)
    except Exception as error:  # NOTE: the model's own code runs here
        return replace(site, reason=f"its weight cannot be computed alone ({str(error)[:80]})")
    if isinstance(weight, UninitializedParameter):
        return replace(site, reason="lazy: its weight has no shape before a first forward")
    if not weight.is_floating_point() or weight.dim() < 2:
        return replace(site, reason=f"its weight is {str(weight.dtype)[6:]} of {weight.dim()} dimensions")
    groups = _groups(call)
    site = replace(site, weight_shape=tuple(weight.shape), groups=groups or 1)
    layout = channel_layout(call.function, call.weight_at, site.weight_shape, groups or 1)
    if layout is None or groups is None:
        return replace(site, one_scale=f"one scale: {call.function} has no channel of its own to scale")
    if layout != _layer_layout(one.module, call, site):
        told = f"one scale: {call.function} has its channels along another axis than {site.name}"
        return replace(site, one_scale=told)
    if math.prod(site.weight_shape) < FEWEST_PER_COLUMN * layout.channels and call.function not in LAYER_FUNCTIONS:
        return replace(site, one_scale="one scale: its columns are too short for a scale each")
    return site


def _layer_layout(module: nn.Module, call: ProductCall, site: CallSite) -> ChannelLayout | None:
    """Return the layout that the holder of a call has: of a layer its own, of any other holder the call's."""
    if site.call.holder != site.name or site.call.holder in site.call.modules:
        return _layout_of(site)
    layer, shape = module.get_submodule(call.raw.rpartition(".")[0]), site.weight_shape
    if getattr(layer, "transposed", False):
        return ChannelLayout.transposed(shape, int(layer.groups))  # type: ignore[arg-type]
    return ChannelLayout.forward(shape)


def _groups(call: ProductCall) -> int | None:
    """Return the groups of a transposed convolution, None if they depend on data; 1 for any other function."""
    if not call.function.startswith("conv_transpose"):
        return 1
    values = dict(zip(NAMES[call.function], call.node.args, strict=False)) | dict(call.node.kwargs)
    groups = values.get("groups", 1)
    return groups if isinstance(groups, int) else None


def _raw_shape(module: nn.Module, call: ProductCall) -> tuple[int, ...]:
    owner, _, name = call.tensors[0].rpartition(".")
    return tuple(getattr(module.get_submodule(owner), name).shape)


def _numel(module: nn.Module, name: str) -> int:
    owner, _, tensor = name.rpartition(".")
    value = getattr(module.get_submodule(owner), tensor, None)
    return value.numel() if isinstance(value, Tensor) and not isinstance(value, UninitializedParameter) else 0


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def attention_class(original: type[nn.MultiheadAttention]) -> type[nn.MultiheadAttention] | None:
    """Return the class of an attention block whose projections are sites; None for a subclass with its own forward."""
    if original.forward is not nn.MultiheadAttention.forward:
        return None
    if original is nn.MultiheadAttention:
        return QuantMultiheadAttention
    if original not in _ATTENTION_CLASSES:
        body = {"original": original, "__module__": original.__module__}
        _ATTENTION_CLASSES[original] = type(f"Quant{original.__name__}", (QuantMultiheadAttention, original), body)
    return _ATTENTION_CLASSES[original]


def attention_sites(paths: dict[str, nn.Module]) -> list[CallSite]:
    """Return the call sites in every `nn.MultiheadAttention` that has torch's own forward."""
    found: dict[int, list[CallSite]] = {}
    for path, module in paths.items():
        if not isinstance(module, nn.MultiheadAttention) or id(module) in found:
            continue
        if attention_class(type(module)) is not None:
            found[id(module)] = [_projection(path, module, name) for name in PROJECTIONS]
            found[id(module)] += [_product(path, name) for name in (SCORES, VALUES)]
    return [site for sites in found.values() for site in sites]


def _product(path: str, name: str) -> CallSite:
    call = Call(name, (path,), _join(path, f"{name}_site"), (), True)
    return CallSite(_join(path, name), name, call, (name,), nonnegative=name == VALUES)


def _projection(path: str, module: nn.MultiheadAttention, name: str) -> CallSite:
    tensor = _join(path, "in_proj_weight" if module.in_proj_weight is not None else f"{name}_weight")
    weight = projection_weight(module, name)
    lazy = isinstance(weight, UninitializedParameter)
    return CallSite(
        _join(path, name), "linear", Call("linear", (path,), _join(path, f"{name}_site"), (tensor,)), (name,),
        () if lazy else tuple(weight.shape), direct=True,
        reason="lazy: its weight has no shape before a first forward" if lazy else "",
    )  # fmt: skip
