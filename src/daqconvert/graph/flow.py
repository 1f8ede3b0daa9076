"""Who is first, who is last, who is proven non-negative, in what order: read off an fx graph."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import fx, nn

from daqconvert.graph.reads import Read, is_shape
from daqconvert.graph.signs import nonnegative_nodes


@dataclass(frozen=True)
class Flow:
    """What the dataflow says about the sites, by dotted name.

    Attributes:
        order: Sites in order of their first call, functional calls included.
        first: Sites that a model input reaches without passing another site.
        last: Sites whose output reaches a model output without passing another site.
        nonnegative: Sites whose every input is proven non-negative.
    """

    order: tuple[str, ...] = ()
    first: frozenset[str] = frozenset()
    last: frozenset[str] = frozenset()
    nonnegative: frozenset[str] = frozenset()


def read_flow(
    graph: fx.Graph, modules: dict[str, nn.Module], sites: dict[str, str], reads: Sequence[tuple[Read, str]] = ()
) -> Flow:
    """Read a model's dataflow.

    Args:
        graph: Of the model in evaluation mode.
        modules: `dict(model.named_modules(remove_duplicate=False))`.
        sites: Any dotted name of a site -> the name it goes by (a module may have two).
        reads: Functional calls that are sites, each with the site's name.
    """
    functional: dict[fx.Node, list[str]] = {}
    for read, name in reads:
        functional.setdefault(read.node, []).append(name)
    calls: dict[fx.Node, list[str]] = {}
    for node in graph.nodes:
        inside = list(functional.get(node, ()))
        if node.op == "call_module":
            target = str(node.target)
            inside += [own for name, own in sites.items() if name == target or name.startswith(target + ".")]
        if inside:
            calls[node] = list(dict.fromkeys(inside))
    proven = nonnegative_nodes(graph, modules)
    unproven = {s for n, names in calls.items() for s in names if not _input_proven(n, proven, names, sites)}
    called = list(dict.fromkeys(name for names in calls.values() for name in names))
    first = _reach([n for n in graph.nodes if n.op == "placeholder"], calls, forward=True)
    last = _reach([n for n in graph.nodes if n.op == "output"], calls, forward=False)
    return Flow(
        order=tuple(called),
        first=frozenset(calls[n][0] for n in first),
        last=frozenset(calls[n][-1] for n in last),
        nonnegative=frozenset(set(called) - unproven),
    )


def _input_proven(node: fx.Node, proven: set[fx.Node], names: list[str], sites: dict[str, str]) -> bool:
    """A site's own call with a proven input; sites hidden inside a leaf, and functional calls, prove nothing."""
    value = node.args[0] if node.args else node.kwargs.get("input")
    return node.op == "call_module" and str(node.target) in sites and len(names) == 1 and value in proven


def _reach(start: Iterable[fx.Node], calls: dict[fx.Node, list[str]], forward: bool) -> list[fx.Node]:
    """Site calls met first on the way from `start`, in graph order; shapes carry no values and end a path."""
    seen: set[fx.Node] = set()
    stack, met = list(start), set()
    while stack:
        node = stack.pop()
        if node in seen or is_shape(node):
            continue
        seen.add(node)
        if node in calls:
            met.add(node)
        else:
            stack.extend(node.users if forward else node.all_input_nodes)
    return [node for node in calls if node in met]
