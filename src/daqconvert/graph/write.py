"""Functions written from fx graphs; their first argument is the module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn

Forward = Callable[..., Any]


def write(graph: fx.Graph, name: str) -> Forward:
    """Return the function that a graph describes; its first argument is the module."""
    code = graph.python_code("self")
    scope = dict(code.globals)
    exec(compile(code.src, f"<{name}, rewritten by daqconvert>", "exec"), scope)  # source: written by torch.fx itself
    function: Forward = scope["forward"]
    return function


def ancestors(node: fx.Node) -> set[fx.Node]:
    """Return a node and everything that it is computed from."""
    found: set[fx.Node] = set()
    stack = [node]
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found


def weight_function(graph: fx.Graph, weight: fx.Node) -> Callable[[nn.Module], Tensor]:
    """Return a function that computes a call's weight from the module.

    Args:
        graph: Of the module's own forward.
        weight: A node that depends on no argument.
    """
    own, needed = fx.Graph(), ancestors(weight)
    copied: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node in needed:
            copied[node] = own.node_copy(node, copied.__getitem__)
    own.output(copied[weight])
    return write(own, "weight")
