"""What is seen of a model before anything is said about its sites: modules, dataflow, functional calls."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx, nn

from daqconvert.graph.flow import Flow, read_flow
from daqconvert.graph.reads import Read, find_reads
from daqconvert.graph.trace import trace
from daqconvert.layers.base import QuantizedLayer
from daqconvert.layers.frozen import FrozenLayer
from daqconvert.layers.registry import is_site_type
from daqconvert.modes import evaluating


@dataclass(frozen=True)
class View:
    """What is seen of a model.

    Attributes:
        paths: Any dotted name -> module.
        aliases: Any dotted name of a site -> the name it goes by.
        flow: What the whole-model trace says, or None where fx cannot follow the model.
        read: Sites whose weight a forward reads without calling them.
        bare: Parameters of no site that a functional call multiplies by -> the call.
    """

    paths: dict[str, nn.Module]
    aliases: dict[str, str]
    flow: Flow | None
    read: frozenset[str] = frozenset()
    bare: dict[str, str] | None = None

    @property
    def named(self) -> dict[str, nn.Module]:
        """Sites that are modules, in order of registration."""
        return {name: self.paths[name] for name in dict.fromkeys(self.aliases.values())}


def look(model: nn.Module, given: tuple[int, frozenset[str]] | None = None) -> View:
    """Look at a model: walk its modules, trace it, and trace alone what the whole-model trace cannot look into.

    Args:
        model: A copy of the user's: its code runs here with proxies and may keep them.
        given: Number of positional arguments and names of the keyword ones; None: those without a default.
    """
    paths = dict(model.named_modules(remove_duplicate=False))
    own: dict[int, str] = {}
    for name, module in paths.items():
        if is_site_type(module) or isinstance(module, (QuantizedLayer, FrozenLayer)):
            own.setdefault(id(module), name)
    aliases = {name: own[id(module)] for name, module in paths.items() if id(module) in own}
    if "" in aliases:  # the root itself is a site: fx would look inside it
        return View(paths, aliases, Flow((aliases[""],), frozenset({""}), frozenset({""})))
    with evaluating(model):
        graph = trace(model, given)
        reads = [(read.target, read) for read in find_reads(graph, model)] if graph is not None else []
        reads += [item for name in _hidden(paths, aliases, graph) for item in _reads_alone(name, paths[name])]
    owners: dict[int, list[str]] = {}
    for name in dict.fromkeys(aliases.values()):
        for parameter in paths[name]._parameters.values():
            owners.setdefault(id(parameter), []).append(name)
    read_sites: set[str] = set()
    bare: dict[str, str] = {}
    calls: list[tuple[Read, str]] = []
    for target, read in reads:
        names = owners.get(id(model.get_parameter(target)), [])
        read_sites.update(names)
        if not names and read.multiplies:
            bare.setdefault(target, read.call)
        if names or read.multiplies:
            calls.append((read, names[0] if names else target))
    flow = None if graph is None else read_flow(graph, paths, aliases, calls)
    return View(paths, aliases, flow, frozenset(read_sites), bare)


def _hidden(paths: dict[str, nn.Module], aliases: dict[str, str], graph: fx.Graph | None) -> list[str]:
    """Modules that the whole-model trace took as one node, or lies within one; all of them where there is no trace."""
    leaves = {str(n.target) for n in graph.nodes if n.op == "call_module"} if graph is not None else {""}
    inside = tuple(f"{leaf}." if leaf else "" for leaf in leaves)
    return [
        name
        for name, module in paths.items()
        if (name in leaves or name.startswith(inside))
        and name not in aliases
        and not type(module).__module__.startswith("torch.nn.")
    ]


def _reads_alone(name: str, module: nn.Module) -> list[tuple[str, Read]]:
    graph = trace(module, alone=True)
    prefix = f"{name}." if name else ""
    return [] if graph is None else [(prefix + read.target, read) for read in find_reads(graph, module)]
