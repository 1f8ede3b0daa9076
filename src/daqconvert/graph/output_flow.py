"""What happens to the output of each site before another operation computes with it: batch norm, activation, sums.

An integer-only runtime computes a convolution, its batch norm and an activation that clips in one step, and rounds the
result once, to the grid of the site that reads it. Therefore the output of each site, and of each sum of outputs, is
followed as long as it has exactly one user and this user is a batch norm, an activation that only clips, or an
operation that moves elements.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx, nn

from daqconvert.graph.signs import CLIPS, clip_limits, library_type, torch_name
from daqconvert.layers.integer_layers import folds, only_clips
from daqconvert.spec import Concat, SiteOutput

ACTIVATIONS: dict[str, tuple[float, float]] = {
    "ReLU": (0.0, math.inf), "relu": (0.0, math.inf), "relu_": (0.0, math.inf), "relu6": (0.0, 6.0),
}  # fmt: skip
SAME = {"Identity", "Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "DropPath", "AlphaDropout"}
SAME_CALLS = {"dropout", "dropout_", "feature_dropout", "contiguous", "clone"}
MOVING = {"MaxPool1d", "MaxPool2d", "MaxPool3d", "Flatten", "Unflatten"}
MOVING_CALLS = {"max_pool1d", "max_pool2d", "max_pool3d", "boolean_dispatch", "flatten", "reshape", "view"}
JOINING_CALLS = {"cat", "concat", "getitem", "pad", "channel_shuffle", "chunk", "split", "permute", "transpose"}
SUMS = {"add", "add_", "iadd"}
CONCATENATIONS = {"cat", "concat"}
OPERATOR_MODULES = ("activation", "pooling", "normalization", "batchnorm", "upsampling")
"""Modules of `torch.nn.modules` whose classes return one tensor, which they have computed."""
OPERATORS = {
    "silu", "gelu", "sigmoid", "tanh", "hardswish", "hardsigmoid", "softmax", "leaky_relu", "elu", "mish", "softplus",
    "layer_norm", "mul", "mul_", "imul", "mean", "avg_pool2d", "adaptive_avg_pool2d", "interpolate", "matmul",
    "scaled_dot_product_attention", "sub", "truediv", "div", *SUMS,
}  # fmt: skip


@dataclass
class OutputFlow:
    """What happens to the outputs of a model's sites, and to sums of these outputs.

    Attributes:
        sites: Name of a site -> facts about its output.
        sums: Facts about each sum of outputs, in order of execution; a sum is named by its `place`.
        concats: Outputs that are concatenated, in order of execution.
        operators: Facts about the outputs of what computes between the sites (activations that do more than clip,
            averages, products), in order of execution; each is named by its `place`.
    """

    sites: dict[str, SiteOutput] = field(default_factory=dict)
    sums: list[SiteOutput] = field(default_factory=list)
    concats: list[Concat] = field(default_factory=list)
    operators: list[SiteOutput] = field(default_factory=list)


def find_outputs(
    graph: fx.Graph, modules: dict[str, nn.Module], own: dict[fx.Node, str], proven: set[fx.Node]
) -> OutputFlow:
    """Follow the output of every site that is called once, and of every sum of such outputs.

    `graph` is that of the whole model; `own` maps calls that compute one site and nothing else to the site's name;
    `proven` are the nodes whose value is proven non-negative.
    """
    return _Search(graph, modules, own, proven).run()


@dataclass
class _Way:
    """The way of one output through the graph, from the node that computes it to the last node that is followed.

    Attributes:
        nodes: The nodes on the way, in order.
        batch_norm: Dotted name of the batch norm on the way; None without one.
        lower: Lower bound of the clipping on the way.
        upper: Upper bound of the clipping on the way.
        inside: Whether the way ends inside its last node: a batch norm whose built-in activation does more than clip.
    """

    nodes: list[fx.Node]
    batch_norm: str | None = None
    lower: float = -math.inf
    upper: float = math.inf
    inside: bool = False


class _Search:
    """Goes through a graph once and follows the output of each site and of each sum."""

    def __init__(
        self, graph: fx.Graph, modules: dict[str, nn.Module], own: dict[fx.Node, str], proven: set[fx.Node]
    ) -> None:
        times = Counter(own.values())
        self.graph, self.modules, self.proven = graph, modules, proven
        # freezing removes the numbers of a batch norm that is folded, and the bias of a layer with integer outputs
        read = [name.rpartition(".") for name in getattr(graph, "read", ())]
        self.read = {id(modules.get(owner)) for owner, _, _ in read}
        biases = {id(modules.get(owner)) for owner, _, key in read if key == "bias"}
        self.own = {
            node: name for node, name in own.items() if times[name] == 1 and id(modules.get(name)) not in biases
        }
        self.returned = Counter(path for node in graph.nodes for path in _places(node))
        self.called = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
        self.sums: dict[fx.Node, str] = {}
        self.operators: dict[fx.Node, str] = {}
        self.followed: set[fx.Node] = set()
        self.last = ""

    def run(self) -> OutputFlow:
        found = OutputFlow()
        for node in self.graph.nodes:
            if node in self.own:
                self.last = self.own[node]
                found.sites[self.last] = self._output(node, batch_norm=True)
            elif _name(node) in SUMS and node.op != "call_module" and (sources := self._sources(node)):
                output = self._output(node, sources=sources, after=self.last)
                if output.place is not None:
                    self.sums[node] = output.place
                    found.sums.append(replace(output, entering=self._entering(node)))
            elif self._is_operator(node):
                output = self._output(node, after=self.last)
                if output.place is not None:
                    self.operators[node] = output.place
                    found.operators.append(output)
            elif _name(node) in CONCATENATIONS and (sources := self._source(node)):
                found.concats.append(Concat(tuple(dict.fromkeys(sources)), tuple(self._readers(node)[0])))
        return found

    def _output(
        self, node: fx.Node, batch_norm: bool = False, sources: tuple[str, ...] = (), after: str = ""
    ) -> SiteOutput:
        way = self._follow(node, batch_norm)
        self.followed.update(way.nodes[1:-1] if way.inside else way.nodes[1:])
        readers, alone = ([], False) if way.inside else self._readers(way.nodes[-1])
        nonnegative = way.lower >= 0.0 or (not way.inside and way.nodes[-1] in self.proven)
        return SiteOutput(
            place=self._place(way), batch_norm=way.batch_norm,
            lower=way.lower if way.lower > -math.inf else None, upper=way.upper if way.upper < math.inf else None,
            readers=tuple(readers), alone=alone, nonnegative=nonnegative,
            sources=sources, after=after,
        )  # fmt: skip

    def _follow(self, start: fx.Node, batch_norm: bool) -> _Way:
        way = _Way([start])
        direct = batch_norm  # a batch norm is folded only if nothing but operations that change no value precede it
        while len(way.nodes[-1].users) == 1:
            node = next(iter(way.nodes[-1].users))
            module = self._module(node)
            if direct and module is not None and self._folds(module) and self.called[str(node.target)] == 1:
                way.batch_norm, direct = str(node.target), False
                act = getattr(module, "act", None)
                if isinstance(act, nn.Module) and not only_clips(act):
                    way.nodes.append(node)
                    way.inside = True
                    return way
                _clip(way, self._bounds(act))
            elif (bounds := self._bounds(module, node)) is not None:
                _clip(way, bounds)
                direct = False
            elif self._moves(node, module):
                direct = direct and self._same(node, module)
            else:
                break
            way.nodes.append(node)
        return way

    def _place(self, way: _Way) -> str | None:
        """Return the last module on the way whose output can be quantized; None if there is none.

        A quantizer before a clip gives the same codes as one after it.
        """
        if way.inside:
            return f"{way.nodes[-1].target}.drop"
        for node in reversed(way.nodes):
            for path in _places(node):
                module = self.modules.get(path)
                if (
                    self.returned[path] == 1
                    and module is not None
                    and not isinstance(module, (nn.Sequential, nn.ModuleList))
                ):
                    return path
            module = self._module(node)
            if module is not None and self._folds(module):
                return None  # a runtime folds the batch norm, so values before it are never rounded
        return None

    def _readers(self, node: fx.Node) -> tuple[list[str], bool]:
        """Return the sites that read a value (its elements may be moved before), and whether nothing else reads it."""
        readers, alone = [], True
        for user in node.users:
            if user in self.own and (user.args[:1] == (node,) or user.kwargs.get("input") is node):
                readers.append(self.own[user])
            elif self._moves(user, self._module(user)) and user.args[:1] == (node,):
                further, only = self._readers(user)
                readers, alone = readers + further, alone and only
            else:
                alone = False
        return list(dict.fromkeys(readers)), alone

    def _sources(self, node: fx.Node) -> tuple[str, ...]:
        """Return the names of the sites and sums that a sum adds; empty if an operand comes from anything else."""
        operands = [a for a in node.args if isinstance(a, fx.Node)]
        if len(operands) < 2 or len(operands) != len(node.args) or node.kwargs:
            return ()
        found = [self._source(operand) for operand in operands]
        return tuple(dict.fromkeys(name for names in found for name in names)) if all(found) else ()

    def _entering(self, node: fx.Node) -> tuple[str, ...]:
        """Return the sites whose output only a sum reads, with nothing between that clips it."""
        found = []
        for at in node.all_input_nodes:
            while len(at.users) == 1 and at not in self.own and at.all_input_nodes:
                module = self._module(at)
                plain = module is not None and self._folds(module) and _only_passes(getattr(module, "act", None))
                if not (plain or self._same(at, module)):
                    break
                at = at.all_input_nodes[0]
            if len(at.users) == 1 and at in self.own:
                found.append(self.own[at])
        return tuple(found)

    def _source(self, node: fx.Node) -> tuple[str, ...]:
        while True:
            if node in self.own:
                return (self.own[node],)
            if node in self.sums:
                return (self.sums[node],)
            module = self._module(node)
            folded = module is not None and self._folds(module)
            if node in self.operators and not folded:
                return (self.operators[node],)
            clips = self._bounds(module, node) is not None
            if not (folded or clips or self._moves(node, module) or _name(node) in JOINING_CALLS):
                return ()
            tensors = node.all_input_nodes
            if len(tensors) > 1:  # parts that were joined (`cat`): each has its own grid
                parts = [self._source(part) for part in tensors]
                return tuple(name for part in parts for name in part) if all(parts) else ()
            if not tensors:
                return ()
            node = tensors[0]

    def _is_operator(self, node: fx.Node) -> bool:
        """Whether a node computes new values, in float, which no way of an output has passed."""
        module = self._module(node)
        if node in self.followed or self._bounds(module, node) is not None or self._moves(node, module):
            return False
        if module is None:
            return _name(node) in OPERATORS
        place = type(module).__module__.split(".")
        kind = place[-1] in OPERATOR_MODULES if place[0] == "torch" else place[:2] == ["timm", "layers"]
        alone = self._folds(module) or next(module.children(), None) is None
        return kind and alone and not isinstance(module, nn.MultiheadAttention)

    def _folds(self, module: nn.Module) -> bool:
        """Whether a module is a batch norm that can be folded, none of whose numbers the model's own code reads."""
        return folds(module) and id(module) not in self.read

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self.modules.get(str(node.target)) if node.op == "call_module" else None

    def _bounds(self, module: nn.Module | None, node: fx.Node | None = None) -> tuple[float, float] | None:
        """Return the bounds that an activation clips to; None if it does more than clip, or is not an activation."""
        if isinstance(module, nn.Hardtanh) and library_type(module) in ("Hardtanh", "ReLU6"):
            return float(module.min_val), float(module.max_val)
        if module is not None:
            return ACTIVATIONS.get(library_type(module))
        if node is None or node.op not in ("call_function", "call_method"):
            return None
        name = torch_name(node)
        return clip_limits(node) if name in CLIPS else ACTIVATIONS.get(name)

    def _same(self, node: fx.Node, module: nn.Module | None) -> bool:
        return library_type(module) in SAME if module is not None else _name(node) in SAME_CALLS

    def _moves(self, node: fx.Node, module: nn.Module | None) -> bool:
        """Whether a node only returns values of its input, at the same or another position."""
        if module is not None:
            return library_type(module) in SAME | MOVING and not getattr(module, "return_indices", False)
        return _name(node) in SAME_CALLS | MOVING_CALLS


def _only_passes(activation: object) -> bool:
    """Whether the activation inside a batch norm, if there is one, changes nothing."""
    return not isinstance(activation, nn.Module) or type(activation) is nn.Identity


def _clip(way: _Way, bounds: tuple[float, float] | None) -> None:
    if bounds is not None:  # both ends pass the clip, for the next interval may lie outside the one so far
        way.lower, way.upper = (min(max(end, bounds[0]), bounds[1]) for end in (way.lower, way.upper))


def _places(node: fx.Node) -> Iterator[str]:
    """Yield the dotted names of the modules whose output is this node's value, innermost first."""
    if node.op == "call_module":
        yield str(node.target)
    yield from (path for path in node.meta.get("returned_by", ()) if path != node.target)


def _name(node: fx.Node) -> Any:
    return torch_name(node) if node.op in ("call_function", "call_method") else ""
