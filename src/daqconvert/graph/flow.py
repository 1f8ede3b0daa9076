"""Facts about sites from a model's dataflow: order, which are first or last, which inputs are non-negative or shared.

They are read from an fx graph of the whole model in evaluation mode.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from daqconvert.graph.calls import Read, call_name, is_shape
from daqconvert.graph.output_flow import OutputFlow, find_outputs
from daqconvert.graph.signs import nonnegative_nodes
from daqconvert.layers.attention import PROJECTIONS
from daqconvert.layers.functions import LAYER_FUNCTIONS


@dataclass(frozen=True)
class Flow:
    """Facts about the sites from the dataflow; sites are given by dotted name.

    Attributes:
        order: Sites in order of their first call.
        first: Sites that a model input reaches without passing another site.
        last: Sites whose output reaches a model output without passing another site.
        nonnegative: Sites whose every input is proven non-negative.
        inputs: Site -> the first site that reads the same tensor; only sites that share their input tensor.
        outputs: What happens to the sites' outputs before another operation uses them.
    """

    order: tuple[str, ...] = ()
    first: frozenset[str] = frozenset()
    last: frozenset[str] = frozenset()
    nonnegative: frozenset[str] = frozenset()
    inputs: Mapping[str, str] = field(default_factory=dict)
    outputs: OutputFlow = field(default_factory=OutputFlow)


def read_flow(
    graph: fx.Graph, modules: dict[str, nn.Module], sites: dict[str, str], reads: Sequence[tuple[Read, str]] = (),
    indirect: frozenset[str] = frozenset(), hooked: frozenset[str] = frozenset(),
) -> Flow:  # fmt: skip
    """Return the facts that a model's graph tells about its sites.

    `modules` are all named modules, aliases included; `sites` maps any dotted name of a site to its site name (one
    module may have several dotted names); `reads` are calls that are sites, each with the site's name; `indirect` are
    sites whose forward may change the input before it multiplies; `hooked` are modules whose inputs or outputs hooks
    may change.
    """
    by_node: dict[fx.Node, list[str]] = {}
    for read, name in reads:
        by_node.setdefault(read.node, []).append(name)
    calls: dict[fx.Node, list[str]] = {}
    within = _within(sites)
    for node in graph.nodes:
        inside = list(by_node.get(node, ()))
        if node.op == "call_module":
            inside += within.get(str(node.target), ())
        if inside:
            calls[node] = list(dict.fromkeys(inside))
    proven = nonnegative_nodes(graph, modules, hooked)
    unproven = {s for n, names in calls.items() for s in names if not _input_proven(n, proven, names, sites)}
    unproven |= indirect | {own for name, own in sites.items() if name in hooked}
    called = list(dict.fromkeys(name for names in calls.values() for name in names))
    own = {n: names[0] for n, names in calls.items() if _own_call(n, names, sites) and names[0] not in indirect}
    first = _reach([n for n in graph.nodes if n.op == "placeholder"], calls, forward=True)
    last = _reach([n for n in graph.nodes if n.op == "output"], calls, forward=False)
    return Flow(
        order=tuple(called),
        first=frozenset(name for n in first for name in entries(calls[n])),
        last=frozenset(calls[n][-1] for n in last),
        nonnegative=frozenset(set(called) - unproven),
        inputs=_same_inputs(calls, sites, modules),
        outputs=find_outputs(graph, modules, own, proven),
    )


def _within(sites: dict[str, str]) -> dict[str, list[str]]:
    """Return a dict: dotted name of a module -> the site that it is, or the sites inside it, in order."""
    within: dict[str, list[str]] = {}
    for name, own in sites.items():
        for path in (name, *above(name)):
            within.setdefault(path, []).append(own)
    return within


def above(name: str) -> Iterator[str]:
    """Yield the dotted names of the modules that contain a name, from the nearest to the root.

    Example:
        >>> list(above("layer4.0.conv1"))
        ['layer4.0', 'layer4', '']
    """
    while name:
        name = name.rpartition(".")[0]
        if name:
            yield name
    yield ""


def entries(names: list[str]) -> list[str]:
    """Return the sites of one node that get the node's inputs: the first, or the projections of an attention block."""
    if not names:
        return []
    block = names[0].removesuffix(PROJECTIONS[0])
    return names[:3] if names[:3] == [block + projection for projection in PROJECTIONS] else names[:1]


def _input_proven(node: fx.Node, proven: set[fx.Node], names: list[str], sites: dict[str, str]) -> bool:
    """Whether a node is a site's own call with a proven input; a site inside a larger node has no proven input."""
    return _own_call(node, names, sites) and _input(node) in proven


def _own_call(node: fx.Node, names: list[str], sites: dict[str, str]) -> bool:
    """Whether a node computes one site and nothing else."""
    layer = node.op == "call_module" and str(node.target) in sites
    return len(names) == 1 and (layer or (node.op == "call_function" and call_name(node) in LAYER_FUNCTIONS))


def _input(node: fx.Node) -> Any:
    return node.args[0] if node.args else node.kwargs.get("input")


def _same_inputs(
    calls: dict[fx.Node, list[str]], sites: dict[str, str], modules: dict[str, nn.Module]
) -> dict[str, str]:
    """Return a dict: site -> the first site that reads the same tensor; only sites that are called once count."""
    times = Counter(name for names in calls.values() for name in names)
    first: dict[Any, str] = {}
    found: dict[str, str] = {}
    for node, names in calls.items():
        block = modules.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(block, nn.MultiheadAttention) and len(set(node.args[:3])) == 1 < len(node.args):
            found |= dict.fromkeys(names[:3], names[0])  # q, k and v of self-attention
        if _own_call(node, names, sites) and times[names[0]] == 1 and isinstance(_input(node), fx.Node):
            shared = first.setdefault(_input(node), names[0])
            if shared != names[0]:
                found[names[0]] = found[shared] = shared
    return found


def _reach(start: Iterable[fx.Node], calls: dict[fx.Node, list[str]], forward: bool) -> list[fx.Node]:
    """Return the calls of sites that paths from `start` reach before any other site, in graph order.

    A path ends at a node that reads only the shape of a tensor, because no values pass through it.
    """
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
