"""Rewriting one module's forward so that calls that multiply go through the modules that hold their quantizers.

The module's class is replaced by a generated subclass, whose forward is the code that torch.fx writes from the traced
graphs. Attributes, methods, the signature and the other entries of the `state_dict` do not change.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from daqconvert.errors import ConversionError
from daqconvert.graph.calls import HELPER, ProductCall, find_calls, keyed
from daqconvert.graph.multiplying import Traced, module_calls
from daqconvert.graph.variants import CONTEXTS, GIVEN, Context, Contexts, Signature, Variant
from daqconvert.layers.attention import SCORES, VALUES, attention
from daqconvert.layers.call_holders import call_site, handle

Forward = Callable[..., Any]
Forwards = dict[tuple[Any, ...], tuple[tuple[str, ...], Forward]]
"""State of a call (`Signature.state`) -> the names of the arguments that its forward takes, and the forward."""

_CLASSES: dict[Any, type[Any]] = {}
CODES = "codes"
"""Name of the child that holds the codes of a frozen module's own weight.

The codes are in a child because the module itself may use any of the names of a `FrozenSite`'s buffers.
"""


@dataclass(frozen=True, eq=False)
class Rewriting:
    """The generated forwards of one module, shared by its copies.

    Attributes:
        signature: Signature of the original's forward.
        forwards: The forwards of the form (quantized or frozen) that the module has.
        frozen_forwards: The forwards of the frozen form, which do not compute the weights that are stored as codes.
        unused: Parameters and buffers of the module that the frozen forwards do not read.
        methods: Other methods that were rewritten -> the rewriting of each.
        layer_name: Name of the module, for messages.
    """

    signature: Signature
    forwards: Forwards
    frozen_forwards: Forwards
    unused: frozenset[str]
    layer_name: str
    methods: dict[str, Rewriting] = dataclasses.field(default_factory=dict)

    def __deepcopy__(self, memo: Any) -> Rewriting:
        return self

    def frozen(self) -> Rewriting:
        """Return the rewriting of the frozen form."""
        methods = {name: method.frozen() for name, method in self.methods.items()}
        return dataclasses.replace(self, forwards=self.frozen_forwards, methods=methods)

    def drop_unused(self, module: nn.Module) -> None:
        """Remove the weights of a frozen module that codes have replaced."""
        for name in self.unused:
            table = module._parameters if name in module._parameters else module._buffers
            if name in table:
                table[name] = None


class Rewritten(nn.Module):
    """Mixin of rewritten modules."""

    rewriting: Rewriting

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute what the original computes, with each product computed by its site.

        Raises:
            ConversionError: If the call takes a path that could not be traced.
        """
        return self._call(self.rewriting, args, kwargs)

    def _call(self, rewriting: Rewriting, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        signature = rewriting.signature
        values = dict(zip(signature.names, args))  # noqa: B905 # the check below finds surplus arguments
        values.update(kwargs)
        state = signature.state(self.training, values)
        unknown = any(value is not None for key, value in kwargs.items() if key not in signature.names)
        if unknown or state not in rewriting.forwards or len(values) != len(args) + len(kwargs):
            raise ConversionError(_no_path(rewriting, state, args, kwargs))
        names, function = rewriting.forwards[state]
        return function(self, *[values[name] for name in names])

    @property
    def itself(self) -> nn.Module:
        """Holder of the module's own weight, for generated code: the module, or its child `CODES` if frozen."""
        return self._modules.get(CODES) or self

    def __deepcopy__(self, memo: Any) -> Any:
        replica = self.__new__(type(self))
        memo[id(self)] = replica
        replica.__dict__ = copy.deepcopy(self.__dict__, memo)
        return replica

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ConversionError(
            f"{self.rewriting.layer_name or '(root)'}: its forward was rewritten, and generated code is not pickled. "
            "Save the state dict: torch.save(qmodel.state_dict(), path); or freeze the model and call daqconvert.save."
        )


def rewritten_class(
    original: type[nn.Module], mixins: tuple[type, ...], prefix: str, methods: tuple[str, ...] = ()
) -> type[Any]:
    """Return a subclass of `original` with a generated forward; `mixins` are added bases, such as `OwnCallHolder`.

    `methods` are the names of other methods that are generated.
    """
    known = (original, mixins, prefix, methods)
    if known not in _CLASSES:
        forward = functools.wraps(original.forward, updated=())(_forward())  # a decorator's marks are of its own code
        if getattr(original.forward, "_torchdynamo_disable", False):
            forward = torch.compiler.disable(forward)
        body = {"forward": forward, "__module__": original.__module__, "original": original}
        for name in methods:
            body[name] = functools.wraps(getattr(original, name), updated=())(_method(name))
        _CLASSES[known] = type(f"{prefix}{original.__name__}", (Rewritten, *mixins, original), body)
    return _CLASSES[known]


def _forward() -> Forward:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return Rewritten.forward(self, *args, **kwargs)

    return forward


def _method(name: str) -> Forward:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._call(self.rewriting.methods[name], args, kwargs)

    return method


def generate(
    original: type[nn.Module], one: Traced, places: dict[tuple[Any, ...], str], with_codes: frozenset[str]
) -> Rewriting:
    """Write the forwards of one traced module of the class `original`.

    `places` maps the key of a call (from `keyed`) to the name of its holder in the module (`"itself"` if the module is
    the holder); `with_codes` are the holders that have codes in the frozen form.
    """
    read: set[str] = set()

    def tables(variants: list[Variant], method: str) -> tuple[Forwards, Forwards]:
        forwards: Forwards = {}
        frozen: Forwards = {}
        # the first product of activations of another method is not the forward's first
        own = {key: place for key, place in places.items() if method == "forward" or key[0]}
        for variant in variants:
            for table, without in ((forwards, frozenset[str]()), (frozen, with_codes)):
                graph = _with_sites(variant.graph, one.module, own, without)
                table[variant.state] = (variant.arguments, write(graph, f"{original.__name__}.{method}"))
            read.update(str(node.target) for node in graph.nodes if node.op in ("get_attr", "call_module"))
        return forwards, frozen

    whole = tables(one.variants, "forward")
    others = {
        name: Rewriting(signature, *tables(variants, name), frozenset(), one.path)
        for name, (signature, variants) in one.methods.items()
    }
    weights = {t for key, call, _ in module_calls(one) if places.get(key) in with_codes for t in call.tensors}
    return Rewriting(one.signature, *whole, frozenset(weights - read), one.path, others)


def _with_sites(
    original: fx.Graph, module: nn.Module, places: dict[tuple[Any, ...], str], with_codes: frozenset[str]
) -> fx.Graph:
    """Return the graph with its calls going through their holders, without what computes weights that have codes."""
    graph, needless = fx.Graph(), set()
    calls = [(places[key], call) for key, call in keyed(find_calls(original, module)) if key in places]
    attentions = {(call.node, call.function): place for place, call in calls if call.function in (SCORES, VALUES)}
    found = {call.node: (place, call) for place, call in calls if call.function not in (HELPER, SCORES, VALUES)}
    handles = {(call.node, call.weight): place for place, call in calls if call.function == HELPER}
    copied: dict[fx.Node, fx.Node] = {}
    contexts = _ContextNodes(graph, original)
    for node in original.nodes:
        contexts.go_to(node)
        if node in found:
            place, call = found[node]
            if place in with_codes and not call.dynamic:
                needless |= ancestors(call.weight)
            copied[node] = _site_node(graph, call, graph.create_node("get_attr", place), copied, place in with_codes)
        elif (node, SCORES) in attentions or (node, VALUES) in attentions:
            parts = [attentions.get((node, product)) for product in (SCORES, VALUES)]
            held = [None if part is None else graph.create_node("get_attr", part) for part in parts]
            args, kwargs = fx.map_arg((node.args, node.kwargs), copied.__getitem__)
            copied[node] = graph.call_function(attention, (*held, *args), kwargs)
        else:
            weights = [weight for weight in node.all_input_nodes if (node, weight) in handles]
            given = {weight: _handle(graph, weight, handles[node, weight], copied) for weight in weights}
            needless |= given.keys()
            copied[node] = graph.node_copy(node, lambda n, given=given: given.get(n, copied[n]))  # type: ignore[misc]
    # NOTE: no other node is removed, because a call whose result is not used may still have an effect
    removable = {copied[node] for node in needless}
    graph.eliminate_dead_code(is_impure_node=lambda node: node not in removable)
    return graph


class _ContextNodes:
    """Writes into a graph the nodes that enter and leave the contexts which another graph's nodes were made in."""

    def __init__(self, graph: fx.Graph, original: fx.Graph) -> None:
        self.graph, self.inside = graph, tuple[Context, ...]()
        used = any(node.meta.get(CONTEXTS) for node in original.nodes)
        self.held = graph.placeholder(CONTEXTS) if used else None

    def go_to(self, node: fx.Node) -> None:
        """Write what leads from the contexts of the node before to those of `node`."""
        if self.held is None or node.op in ("placeholder", "get_attr"):
            return
        wanted = () if node.op == "output" else node.meta.get(CONTEXTS, ())
        kept = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(self.inside, wanted)))  # noqa: B905
        for _ in self.inside[kept:]:
            self.graph.call_method("leave", (self.held,))
        for context in wanted[kept:]:
            self.graph.call_method("enter", (self.held, *context))
        self.inside = wanted


def _handle(graph: fx.Graph, weight: fx.Node, place: str, copied: dict[fx.Node, fx.Node]) -> fx.Node:
    """Return the node that makes the `SiteWeight` which a helper function gets instead of a weight.

    If the holder is the layer that owns the weight, the node takes the holder alone; a bare parameter is passed too.
    """
    holder = graph.create_node("get_attr", place)
    bare = str(weight.target) != f"{place}.weight"
    return graph.call_function(handle, (holder, copied[weight]) if bare else (holder,))


def _site_node(
    graph: fx.Graph, call: ProductCall, holder: fx.Node, copied: dict[fx.Node, fx.Node], with_codes: bool
) -> fx.Node:
    """Return the node that computes a call by its holder; a weight that has codes is not passed."""

    def place(node: fx.Node) -> Any:
        return None if with_codes and node is call.weight and not call.dynamic else copied[node]

    args = fx.map_arg(call.node.args, place)
    kwargs = fx.map_arg(call.node.kwargs, place)
    return graph.call_function(call_site, (holder, call.function, call.weight_at, args, kwargs))


def _no_path(rewriting: Rewriting, state: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    names = rewriting.signature.names
    unknown = [key for key in kwargs if key not in names]
    if unknown or len(args) > len(names):
        return (
            f"{rewriting.layer_name or '(root)'}: expected the arguments {', '.join(names)}, which torch.fx traced; "
            f"found {unknown or f'{len(args)} arguments'}."
        )
    said = [f"{n} {'given' if s == GIVEN else f'= {s}'}" for n, s in zip(rewriting.signature.defaults, state[1:])]  # noqa: B905
    mode = "training" if state[0] else "evaluation"
    return (
        f"{rewriting.layer_name or '(root)'}: torch.fx could not follow its forward in {mode} with {', '.join(said)}, "
        f'so its products were not found there. Leave its layers alone: exclude=["{rewriting.layer_name}*"].'
    )


def weight_function(graph: fx.Graph, weight: fx.Node) -> Callable[[nn.Module], Tensor]:
    """Return a function that computes a call's weight from the module; `weight` must not depend on any argument."""
    own, needed = fx.Graph(), ancestors(weight)
    copied: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node in needed:
            copied[node] = own.node_copy(node, copied.__getitem__)
    own.output(copied[weight])
    return write(own, "weight")


def ancestors(node: fx.Node) -> set[fx.Node]:
    """Return a node and all nodes that it is computed from."""
    found: set[fx.Node] = set()
    stack = [node]
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found


def write(graph: fx.Graph, name: str) -> Forward:
    """Return the function that a graph describes; its first argument is the module."""
    code = graph.python_code("self")
    scope = dict(code.globals)
    exec(compile(code.src, f"<{name}, rewritten by daqconvert>", "exec"), scope)  # torch.fx wrote the source
    function: Forward = scope["forward"]
    if not any(node.op == "placeholder" and node.name == CONTEXTS for node in graph.nodes):
        return function

    def guarded(module: nn.Module, *args: Any) -> Any:
        contexts = Contexts()
        try:
            return function(module, contexts, *args)
        finally:
            contexts.close()

    return guarded
