"""Who is first, who is last, who is proven non-negative, in what order: read off an fx graph."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import fx, nn

from daqconvert.graph.signs import nonnegative_nodes

SHAPE_CALLS = {"size", "dim", "numel", "ndimension", "stride", "is_contiguous"}
SHAPE_ATTRIBUTES = {"shape", "ndim", "device", "dtype", "requires_grad", "is_cuda"}


@dataclass(frozen=True)
class Flow:
    """What the dataflow says about the sites, by dotted name.

    Attributes:
        order: Sites in order of their first call.
        first: Sites that a model input reaches without passing another site.
        last: Sites whose output reaches a model output without passing another site.
        nonnegative: Sites whose every input is proven non-negative.
        weights_read: Parameters that a forward reads by itself (`F.linear(x, self.qkv.weight)`), by dotted name.
    """

    order: tuple[str, ...] = ()
    first: frozenset[str] = frozenset()
    last: frozenset[str] = frozenset()
    nonnegative: frozenset[str] = frozenset()
    weights_read: dict[str, str] = field(default_factory=dict)


def read_flow(graph: fx.Graph, modules: dict[str, nn.Module], sites: dict[str, str]) -> Flow:
    """Read a model's dataflow.

    Args:
        graph: Of the model in evaluation mode.
        modules: `dict(model.named_modules(remove_duplicate=False))`.
        sites: Any dotted name of a site -> the name it goes by (a module may have two).
    """
    calls: dict[fx.Node, list[str]] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            target = str(node.target)
            inside = [own for name, own in sites.items() if name == target or name.startswith(target + ".")]
            if inside:
                calls[node] = list(dict.fromkeys(inside))
    proven = nonnegative_nodes(graph, modules)
    unproven = {s for n, names in calls.items() for s in names if not _input_proven(n, proven, names, sites)}
    called = list(dict.fromkeys(name for names in calls.values() for name in names))
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    outputs = [n for n in graph.nodes if n.op == "output"]
    first = _reach(inputs, calls, forward=True)
    last = _reach(outputs, calls, forward=False)
    return Flow(
        order=tuple(called),
        first=frozenset(calls[n][0] for n in first),
        last=frozenset(calls[n][-1] for n in last),
        nonnegative=frozenset(set(called) - unproven),
        weights_read={str(n.target): _user(n) for n in graph.nodes if n.op == "get_attr"},
    )


def _input_proven(node: fx.Node, proven: set[fx.Node], names: list[str], sites: dict[str, str]) -> bool:
    """A site's own call with a proven first argument; sites hidden inside a leaf prove nothing."""
    return str(node.target) in sites and len(names) == 1 and bool(node.args) and node.args[0] in proven


def _reach(start: Iterable[fx.Node], calls: dict[fx.Node, list[str]], forward: bool) -> list[fx.Node]:
    """Site calls met first on the way from `start`, in graph order; shapes carry no values and end a path."""
    seen: set[fx.Node] = set()
    stack, met = list(start), set()
    while stack:
        node = stack.pop()
        if node in seen or _is_shape(node):
            continue
        seen.add(node)
        if node in calls:
            met.add(node)
        else:
            stack.extend(node.users if forward else node.all_input_nodes)
    return [node for node in calls if node in met]


def _is_shape(node: fx.Node) -> bool:
    if node.op == "call_method":
        return str(node.target) in SHAPE_CALLS
    return node.op == "call_function" and node.target is getattr and node.args[1] in SHAPE_ATTRIBUTES


def _user(node: fx.Node) -> str:
    """Name of the function that reads a parameter first: `linear`, `conv2d`, ..."""
    for user in node.users:
        return str(getattr(user.target, "__name__", user.target))
    return ""
