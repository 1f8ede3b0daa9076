"""Weights that a forward reads by itself: `F.linear(x, self.qkv.weight)`, `F.conv2d(x, self.kernel)`, `x @ self.proj`.

A swap of layers never sees such a call. What is looked for is a call that joins a parameter with something that comes
from the model's inputs, whatever happens to the parameter on its way there (a mean taken off, a transpose).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx, nn
from torch.nn.parameter import UninitializedParameter

SHAPE_CALLS = {"size", "dim", "numel", "ndimension", "stride", "is_contiguous"}
SHAPE_ATTRIBUTES = {"shape", "ndim", "device", "dtype", "requires_grad", "is_cuda"}
FUNCTIONAL = {"linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}
FUNCTIONAL |= {"bilinear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "deform_conv2d"}


@dataclass(frozen=True)
class Read:
    """One call that uses a parameter of two dimensions or more as data.

    Attributes:
        node: The call.
        target: Dotted name of the parameter.
        call: Name of the function called.
    """

    node: fx.Node
    target: str
    call: str

    @property
    def multiplies(self) -> bool:
        """Whether the call is known to be a convolution or a product of matrices."""
        return self.call in FUNCTIONAL


def find_reads(graph: fx.Graph, root: nn.Module) -> list[Read]:
    """Return every call of a graph that joins a parameter with data, in graph order.

    Args:
        graph: Of `root`.
        root: Owner of the parameters.
    """
    data = _data_nodes(graph)
    found = []
    for node in graph.nodes:
        if node.op != "get_attr" or not _is_matrix(root, str(node.target)):
            continue
        seen: set[fx.Node] = set()
        stack = [node]
        while stack:
            for user in stack.pop().users:
                if user in seen or is_shape(user):
                    continue
                seen.add(user)
                if user in data or user.op == "output":
                    found.append(Read(user, str(node.target), call_name(user)))
                else:
                    stack.append(user)
    place = {node: i for i, node in enumerate(graph.nodes)}
    return sorted(found, key=lambda read: place[read.node])


def call_name(node: fx.Node) -> str:
    """Return the name of the function or method that a node calls."""
    return str(node.target) if node.op == "call_method" else str(getattr(node.target, "__name__", node.target))


def is_shape(node: fx.Node) -> bool:
    """Whether a node asks a tensor for its size, type or place, so that no value passes through it."""
    if node.op == "call_method":
        return str(node.target) in SHAPE_CALLS
    return node.op == "call_function" and node.target is getattr and node.args[1] in SHAPE_ATTRIBUTES


def _data_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Nodes whose values depend on a model input."""
    data: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or (not is_shape(node) and any(n in data for n in node.all_input_nodes)):
            data.add(node)
    return data


def _is_matrix(root: nn.Module, target: str) -> bool:
    owner, _, name = target.rpartition(".")
    parameter = root.get_submodule(owner)._parameters.get(name)
    return parameter is not None and not isinstance(parameter, UninitializedParameter) and parameter.dim() > 1
