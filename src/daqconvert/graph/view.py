"""What is seen of a model before anything is said about its sites: modules, dataflow, calls that multiply."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from daqconvert.graph.call_sites import CallSite, attention_sites, find_call_sites, unseen_sites
from daqconvert.graph.calls import Read, find_reads
from daqconvert.graph.flow import Flow, above, read_flow
from daqconvert.graph.trace import trace
from daqconvert.graph.traced import Traced, trace_modules
from daqconvert.layers.frozen_site import FrozenSite
from daqconvert.layers.registry import is_site_type
from daqconvert.layers.site import QuantizedSite
from daqconvert.models import evaluating


@dataclass(frozen=True)
class View:
    """What is seen of a model.

    Attributes:
        paths: Any dotted name -> module.
        aliases: Any dotted name of a layer -> the name it goes by.
        flow: What the whole-model trace says, or None where fx cannot follow the model.
        functional: Sites that are calls, by name.
        traced: Modules whose own forward multiplies, by name.
        failed: Modules that may multiply by themselves and that fx cannot follow, with the reason.
        read: Layers whose weight a forward reads that could not be rewritten, with the reason.
    """

    paths: dict[str, nn.Module]
    aliases: dict[str, str]
    flow: Flow | None
    functional: dict[str, CallSite] = field(default_factory=dict)
    traced: dict[str, Traced] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    read: dict[str, str] = field(default_factory=dict)

    @property
    def named(self) -> dict[str, nn.Module]:
        """Layers, in order of registration."""
        return {name: self.paths[name] for name in dict.fromkeys(self.aliases.values())}


def look(model: nn.Module, given: tuple[int, frozenset[str]] | None = None) -> View:
    """Look at a model: walk its modules, trace it, and trace alone every module that may multiply by itself.

    Args:
        model: A copy of the user's: its code runs here with proxies and may keep them.
        given: Number of positional arguments and names of the keyword ones; None: those without a default.
    """
    paths = dict(model.named_modules(remove_duplicate=False))
    aliases = _aliases(paths)
    with evaluating(model):
        traced, failed = trace_modules(paths, every=False)
        sites = {site.name: site for site in (*find_call_sites(traced, aliases), *attention_sites(paths))}
        graph = trace(model, given) if "" not in aliases else None
        reads = find_reads(graph, model) if graph is not None else []
    owners = _owners(paths, aliases, sites)
    calls: list[tuple[Read, str]] = []
    read_sites: dict[str, str] = {}
    places = {path: i for i, path in enumerate(failed)}
    for read in reads:
        names = owners.get(id(model.get_parameter(read.target)), [])
        calls += [(read, name) for name in names[:1]]
        for name in names:
            maker = min((path for path in above(name) if path in failed), key=places.__getitem__, default=None)
            if name not in sites and maker is not None:
                read_sites[name] = f"{maker or 'the model'} uses its weight without calling it: {failed[maker]}"
    for path, why in failed.items():
        for name, site in unseen_sites(path, paths[path], why, aliases):
            if name not in sites and isinstance(site, str):
                read_sites.setdefault(name, site)
            elif isinstance(site, CallSite):
                sites.setdefault(name, site)
    if "" in aliases:  # the root itself is a layer: fx would look inside it
        flow: Flow | None = Flow((aliases[""],), frozenset({""}), frozenset({""}))
    else:
        known = _in_order(paths, aliases, sites)
        flow = None if graph is None else read_flow(graph, paths, known, calls, _indirect(sites))
    return View(paths, aliases, flow, sites, {one.path: one for one in traced}, failed, read_sites)


def _aliases(paths: dict[str, nn.Module]) -> dict[str, str]:
    own: dict[int, str] = {}
    for name, module in paths.items():
        if is_site_type(module) or isinstance(module, (QuantizedSite, FrozenSite)):
            own.setdefault(id(module), name)
    return {name: own[id(module)] for name, module in paths.items() if id(module) in own}


def _in_order(paths: dict[str, nn.Module], aliases: dict[str, str], sites: dict[str, CallSite]) -> dict[str, str]:
    """Any dotted name of a site -> the name it goes by; an attention block's calls stand before its `out_proj`."""
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
    """Identity of a parameter -> the sites that multiply by it, calls first."""
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
    """Sites whose forward may change the input before it multiplies: nothing is proven about that input."""
    inside = (site for site in sites.values() if site.call.holder in site.call.modules)
    return frozenset(site.name for site in inside if not site.direct)
