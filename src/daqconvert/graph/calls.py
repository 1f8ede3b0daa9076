"""Products that a forward computes itself: `F.linear(x, self.qkv.weight)`, `F.conv2d(x, self.kernel)`, `q @ k`.

Replacing layers by quantized ones does not change such a call, so it is looked for in an fx graph. A value is *data*
if it depends on the forward's arguments. A weight is a value that is computed from parameters and not from data;
operations before the product (subtracting a mean, a transpose) do not matter.

`find_calls` reads the graph of one module's own forward, in which children are single nodes. It returns what each call
multiplies. `find_reads` reads the graph of a whole model. It returns only which calls use a parameter together with
data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from daqconvert.graph.scan import AS_CALLS, ASKED_ATTRIBUTES, ASKED_CALLS, LIKE_CALLS, function_may_multiply
from daqconvert.layers.attention import SCORES, VALUES
from daqconvert.layers.functions import ADDED, ALIASES, FUNCTIONS, METHODS, MULTIPLYING, NAMES, split_einsum

HELPER = "helper function"
ATTENTION = "scaled_dot_product_attention"


@dataclass(frozen=True)
class ProductCall:
    """One call that multiplies.

    Attributes:
        node: The call.
        function: A name of `daqconvert.layers.functions.FUNCTIONS`, `HELPER` for a function that gets a weight and may
            multiply by it, `SCORES` or `VALUES` for a product of fused attention, or the name of a function without a
            quantized form.
        weight: The operand that is the weight; in a product of two activations, the second operand.
        weight_at: Position of `weight` among the two operands, 0 or 1.
        tensors: Parameters and buffers that the weight is computed from, by their names in the module.
        dynamic: Whether the weight depends on the forward's arguments, even if only on their shapes.
    """

    node: fx.Node
    function: str
    weight: fx.Node
    weight_at: int
    tensors: tuple[str, ...]
    dynamic: bool

    @property
    def raw(self) -> str:
        """Name of the parameter or buffer that is the weight itself; empty if the weight is computed from others."""
        return str(self.weight.target) if self.weight.op == "get_attr" else ""

    def is_parameter(self, module: nn.Module) -> bool:
        """Whether the weight is computed from a parameter, and not from buffers alone."""
        return any(isinstance(_tensor(module, name), nn.Parameter) for name in self.tensors)


def find_calls(graph: fx.Graph, module: nn.Module) -> list[ProductCall]:
    """Return the products of a module's own forward, in graph order; products of constants are left out."""
    data = _data_nodes(graph)
    origins = _origins(graph, module, data)
    given = _given(graph)
    found = []
    for node in graph.nodes:
        function = _function(node)
        if node in data and function is None:
            found += [
                ProductCall(node, HELPER, weight, 1, (str(weight.target),), False)
                for weight in node.all_input_nodes
                if weight.op == "get_attr" and origins[weight] and _is_helper(node)
            ]
        if node in data and call_name(node) == ATTENTION:
            found += [ProductCall(node, product, node, 1, (), True) for product in (SCORES, VALUES)]
        if function is None or node not in data:
            continue
        operands = _operands(node, function)
        if function not in FUNCTIONS:
            found += _unsupported(node, function, module, data, origins, given)
            continue
        if len(operands) != 2:
            continue
        x, weight = operands
        weight_at = 1
        is_layer = NAMES.get(function, ("", ""))[1:2] == ("weight",)
        if not is_layer and x not in data and origins[x]:
            x, weight, weight_at = weight, x, 0
        elif not is_layer and (x not in data or (weight not in data and not origins[weight])):
            continue  # one operand is a constant but not a weight: a mask, a table of positions
        tensors = origins[weight] if is_layer or weight not in data else ()
        found.append(ProductCall(node, function, weight, weight_at, tensors, weight in given))
    return found


def _unsupported(
    node: fx.Node, function: str, module: nn.Module, data: set[fx.Node], origins: dict[fx.Node, tuple[str, ...]],
    given: set[fx.Node],
) -> list[ProductCall]:  # fmt: skip
    """Return the products of a call that has no quantized form: one for each weight among its arguments."""
    weights = [n for n in node.all_input_nodes if n not in data and origins[n]]
    weights = [
        n for n in weights if any(_tensor(module, name).dim() > 1 for name in origins[n])
    ] or weights  # the others are biases
    calls = [ProductCall(node, function, weight, 1, origins[weight], weight in given) for weight in weights]
    if not calls and function in ("bilinear", "deform_conv2d", "multi_head_attention_forward"):
        return [ProductCall(node, function, node.all_input_nodes[-1], 1, (), True)]
    return calls


def keyed(calls: list[ProductCall]) -> Iterator[tuple[tuple[Any, ...], ProductCall]]:
    """Yield each call with its key, which is the same in every trace of a forward.

    Calls of the same function with the same weight have the same key.
    """
    ordinals: dict[tuple[str, ...], dict[Any, int]] = {}
    for call in calls:
        known = ordinals.setdefault(call.tensors or (call.function,), {})
        identity = call.raw or (call.weight if call.tensors else call.node)
        yield (call.tensors, call.raw, call.function, known.setdefault(identity, len(known))), call


def _function(node: fx.Node) -> str | None:
    """Return what a node multiplies by: a name in `FUNCTIONS`, another text if it has no quantized form, or None."""
    known, name = None, call_name(node).partition(".")[0].removeprefix("linalg_")
    if node.op == "call_function":
        known = ALIASES.get(node.target) if getattr(node.target, "__hash__", None) else None
    elif node.op == "call_method":
        known = METHODS.get(name)
    else:
        return None
    if known is None:
        return None if name not in MULTIPLYING else str(node.target) if name in FUNCTIONS else name
    if node.kwargs.get("out") is not None:
        return f"{known} with out="
    if known == "einsum" and len(split_einsum(node.args)[0]) > 2:
        return f"einsum of {len(split_einsum(node.args)[0])} operands"
    return known


def _is_helper(node: fx.Node) -> bool:
    """Whether a node is a function that fx was told not to look into, and that may multiply."""
    function = node.target
    known = node.op == "call_function" and isinstance(function, FunctionType)
    return known and not function.__module__.startswith("torch.") and function_may_multiply(function)


def _operands(node: fx.Node, function: str) -> list[fx.Node]:
    if function == "einsum":
        operands: list[Any] = split_einsum(node.args)[0]
    else:
        names = NAMES.get(function, ("input", "weight"))
        values = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
        values.setdefault(names[0], values.get("self"))
        operands = [values.get(name) for name in (names[1:3] if function.rstrip("_") in ADDED else names[:2])]
    return [operand for operand in operands if isinstance(operand, fx.Node)]


def _origins(graph: fx.Graph, module: nn.Module, data: set[fx.Node]) -> dict[fx.Node, tuple[str, ...]]:
    """Return for each node the parameters and buffers that it is computed from (those of 2 dimensions or more).

    For a node that is computed from none of these, the parameters of one dimension are returned.
    """
    matrices = _sources(graph, module, data, lambda tensor: tensor.dim() > 1)
    vectors = _sources(graph, module, data, lambda tensor: tensor.dim() == 1 and isinstance(tensor, nn.Parameter))
    return {node: found or vectors[node] for node, found in matrices.items()}


def _sources(
    graph: fx.Graph, module: nn.Module, data: set[fx.Node], counts: Callable[[Tensor], bool]
) -> dict[fx.Node, tuple[str, ...]]:
    origins: dict[fx.Node, tuple[str, ...]] = {}
    for node in graph.nodes:
        own: tuple[str, ...] = ()
        if node.op == "get_attr" and isinstance(value := _tensor(module, str(node.target)), Tensor):
            own = (str(node.target),) if not _is_lazy(value) and counts(value) else ()
        elif node.op == "call_module" and node not in data:
            child = module.get_submodule(str(node.target))
            own = tuple(f"{node.target}.{name}" for name, p in child.named_parameters() if counts(p))
        inputs = [] if node.op == "call_module" and node in data else value_inputs(node)
        origins[node] = tuple(dict.fromkeys((*own, *(name for n in inputs for name in origins[n]))))
    return origins


def _is_lazy(tensor: Tensor) -> bool:
    return isinstance(tensor, (UninitializedParameter, UninitializedBuffer))


def _tensor(module: nn.Module, name: str) -> Any:
    owner, _, attribute = name.rpartition(".")
    try:
        return getattr(module.get_submodule(owner), attribute, None)
    except AttributeError:
        return None


class Read(NamedTuple):
    """One call that uses a parameter of two dimensions or more together with data.

    Attributes:
        node: The call.
        tensor: Dotted name of the parameter.
        operand: What the call gets: the parameter, or what is computed from it, such as one part of a split.
    """

    node: fx.Node
    tensor: str
    operand: fx.Node


def find_reads(graph: fx.Graph, root: nn.Module) -> list[Read]:
    """Return every call in the graph of `root` that uses one of its parameters together with data, in graph order."""
    data = _data_nodes(graph)
    found = []
    for node in graph.nodes:
        if node.op != "get_attr" or not _is_matrix(root, str(node.target)):
            continue
        seen: set[fx.Node] = set()
        stack = [node]
        while stack:
            read = stack.pop()
            for user in read.users:
                if user in seen or read not in value_inputs(user):
                    continue
                seen.add(user)
                if user in data or user.op == "output":
                    found.append(Read(user, str(node.target), read))
                else:
                    stack.append(user)
    place = {node: i for i, node in enumerate(graph.nodes)}
    return sorted(found, key=lambda read: place[read.node])


def multiplying_site(read: Read, reads: list[Read], owners: list[str]) -> list[str]:
    """Return the site that makes a call, of those that multiply by the call's parameter, in order of their calls.

    Each part of a parameter (`w.split(8)`) is an operand of its own, and belongs to one site. If the operands do not
    correspond to the sites, the first site stands for all.
    """
    operands = list(dict.fromkeys(one.operand for one in reads if one.tensor == read.tensor))
    place = operands.index(read.operand) if owners and len(operands) % len(owners) == 0 else 0
    return owners[place % len(owners) :][:1] if owners else []


def _is_matrix(root: nn.Module, tensor: str) -> bool:
    owner, _, name = tensor.rpartition(".")
    parameter = root.get_submodule(owner)._parameters.get(name)
    return parameter is not None and not isinstance(parameter, UninitializedParameter) and parameter.dim() > 1


def _data_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes that are data: their values depend on an argument of the forward."""
    data: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or (not is_shape(node) and any(n in data for n in node.all_input_nodes)):
            data.add(node)
    return data


def _given(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes that depend on an argument, even if only on its shape."""
    given: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or not given.isdisjoint(node.all_input_nodes):
            given.add(node)
    return given


def call_name(node: fx.Node) -> str:
    """Return the name of the function or method that a node calls."""
    return str(node.target) if node.op == "call_method" else str(getattr(node.target, "__name__", node.target))


def is_shape(node: fx.Node) -> bool:
    """Return whether a node asks a tensor for its size, dtype or device, so that no value passes through it."""
    if node.op == "call_method":
        return str(node.target) in ASKED_CALLS
    if node.op != "call_function":
        return False
    if node.target is getattr:
        return node.args[1] in ASKED_ATTRIBUTES
    return getattr(torch, call_name(node), None) is node.target and call_name(node) in ASKED_CALLS


def value_inputs(node: fx.Node) -> list[fx.Node]:
    """Return the nodes whose values a node uses: not those that it asks for size, dtype or device alone.

    `zeros_like(w)`, `w.new_zeros(...)` and `x.type_as(w)` use no value of `w`.
    """
    name = call_name(node) if node.op in ("call_function", "call_method") else ""
    if is_shape(node) or name in LIKE_CALLS:
        return []
    return [n for n in node.all_input_nodes if n in node.args[:1]] if name in AS_CALLS else node.all_input_nodes
