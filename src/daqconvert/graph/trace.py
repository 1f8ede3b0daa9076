"""Tracing a model with torch.fx; sites, torch's own modules and what timm declares untraceable become single nodes."""

from __future__ import annotations

import inspect
import operator
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.proxy import ParameterProxy

from daqconvert.graph.signs import is_number, library_type, torch_name
from daqconvert.layers.registry import is_site_type


class SiteTracer(fx.Tracer):
    """`torch.fx.Tracer` whose leaves (single nodes) are the sites, torch's own modules and the classes given to it.

    Args:
        notrace_modules: More classes that become one node.
        notrace_functions: Functions that become one node.
        given: The arguments that a caller gives: how many by position, and the names of the keyword arguments. None
            stands for the arguments without a default. All others keep their default value, so that the trace can
            decide code such as `if mask is None`.
        alone: Make every child one node: trace a module's own forward and nothing below it.
    """

    def __init__(
        self,
        notrace_modules: tuple[type, ...] = (),
        notrace_functions: tuple[Callable[..., Any], ...] = (),
        given: tuple[int, frozenset[str]] | None = None,
        alone: bool = False,
    ) -> None:
        super().__init__(autowrap_functions=notrace_functions)
        self.notrace_modules, self.given, self.alone = notrace_modules, given, alone
        self._named: dict[int, tuple[Tensor, str]] | None = None
        self._constants = 0
        self.read: set[str] = set()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Return whether `m` becomes one node."""
        if self.alone or is_site_type(m) or isinstance(m, self.notrace_modules):
            return True
        return super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: Any, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what a module returns; the node remembers that it is this module's output."""
        out = super().call_module(m, forward, args, kwargs)
        if isinstance(out, fx.Proxy):
            out.node.meta.setdefault("returned_by", []).append(self.path_of_module(m))
        return out

    def trace(self, root: Any, concrete_args: Any = None) -> fx.Graph:
        """Return the graph of a module's forward, and drop every reference to the module.

        `graph.read` holds the names of the parameters and buffers that code outside of the leaves has read, also where
        the graph does not show it (a dtype, whether there is a bias, a number computed while tracing).

        `torch.fx.Tracer` keeps references that form a cycle with the tracer. They would hold the model's buffers in
        memory until the garbage collector runs.
        """
        try:
            graph = super().trace(root, concrete_args)
            graph.read = frozenset(self.read)  # type: ignore[attr-defined] # a graph has no place for such notes
            return graph
        finally:
            self.root, self._named = nn.Module(), None
            self.submodule_paths, self.tensor_attrs = None, {}

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Return the value of an attribute that the traced code reads: a node if it is a parameter of the root."""
        name = self._name(attr_val, read=True) if isinstance(attr_val, Tensor) else None
        if name is not None:
            self.read.add(name)
        proxied = isinstance(attr_val, nn.Parameter) or self.proxy_buffer_attributes
        if name is None or not proxied:
            return attr_val
        if name not in parameter_proxy_cache:
            make = (lambda node: ParameterProxy(self, node, name, attr_val)) if self.param_shapes_constant else None
            parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {}, proxy_factory_fn=make)
        return parameter_proxy_cache[name]

    def create_arg(self, a: Any) -> Any:
        """Return what stands for an argument in the graph: for a tensor, a node that reads it from the root."""
        name = self._name(a) if isinstance(a, Tensor) else None
        if name is None and (isinstance(a, nn.Parameter) or not isinstance(a, Tensor)):
            return super().create_arg(a)
        name = name or self.tensor_attrs.get(a)
        if name is not None:
            self.read.add(name)
        if name is None:  # a constant, made by the model's code
            if a.requires_grad:  # from parameters, read past `getattr`: nobody knows which
                self.read |= {known for known, _ in (*self.root.named_parameters(), *self.root.named_buffers())}
            while hasattr(self.root, f"_tensor_constant{self._constants}"):
                self._constants += 1
            name = self.tensor_attrs[a] = f"_tensor_constant{self._constants}"
            setattr(self.root, name, a)
        return self.create_node("get_attr", name, (), {})

    def _name(self, tensor: Tensor, read: bool = False) -> str | None:
        """Return the name of a parameter or buffer; None for any other tensor.

        The tensors are looked up in a dict, because `torch.fx.Tracer` searches all of the model's tensors for each one
        that it meets, which takes time quadratic in their number. `read` builds the dict again for an unknown tensor.
        """
        if self._named is None or (read and id(tensor) not in self._named):  # registered during the trace
            named = (*self.root.named_parameters(), *self.root.named_buffers())
            self._named = {id(tensor): (tensor, name) for name, tensor in reversed(named)}  # the first name wins
        found = self._named.get(id(tensor))
        return None if found is None else found[1]

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """Return the root's arguments: placeholders for the given ones, default values for all others."""
        root_fn, args = super().create_args_for_root(root_fn, is_module, concrete_args)
        proxies = [a for a in args if isinstance(a, fx.Proxy)]
        names = [str(a.node.target) for a in proxies]
        if self.given is None:
            given = {n for n, a in zip(names, proxies, strict=True) if not a.node.args} or set(names[:1])
        else:
            given = {*names[: self.given[0]], *self.given[1]}
        return root_fn, [a if not isinstance(a, fx.Proxy) or a.node.target in given else _default(a) for a in args]


def _default(proxy: fx.Proxy) -> Any:
    """Return the value of an argument that a call omits; fx names `*args` and `**kwargs` with their stars."""
    name = str(proxy.node.target)
    if name.startswith("*"):
        return {} if name.startswith("**") else ()
    return proxy.node.args[0] if proxy.node.args else proxy


def trace(
    model: nn.Module, given: tuple[int, frozenset[str]] | None = None, *, alone: bool = False
) -> fx.Graph | None:
    """Return the graph of a model's forward, or None if fx cannot follow it.

    The model should be in evaluation mode, and a copy, because its own code runs here and may store proxies. `given`
    is the number of positional arguments and the names of keyword arguments, or None for the arguments without a
    default; `alone` makes every child a single node.
    """
    try:
        return SiteTracer(*timm_notrace(), given=given, alone=alone).trace(model)
    except Exception:  # NOTE: the model's own code runs here with proxies and may raise anything
        return None


VIEWS = {
    *("view", "view_as", "reshape", "flatten", "unflatten", "getitem", "select", "narrow", "chunk", "split", "unbind"),
    *("tensor_split", "transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis", "squeeze", "unsqueeze"),
    *("expand", "expand_as", "detach", "contiguous", "to", "float", "unfold", "diagonal", "t", "ravel", "dropout"),
    *("feature_dropout", "real", "imag", "view_as_real", "view_as_complex"),
}
"""Functions whose result may have the memory of their first argument."""
WRITING_OPERATORS = {"iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "setitem"}
WRITING_OPERATORS |= {"ilshift", "irshift"}
SAME_MODULES = {"Identity", "Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "DropPath", "Flatten", "Unflatten"}


def in_sequence(graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
    """Let every call after one that changes a tensor in place read that call instead of the tensor, in the graph.

    After `h.relu_()` or `self.act(h)` with `inplace=True`, `h` is what the call returned, whether or not the code uses
    this. A tensor that shares memory with a changed one becomes a call of `changed`, about whose value nothing is
    known. The graph is for reading only: it does not run afterwards.
    """
    root: dict[fx.Node, fx.Node] = {}
    sharing: dict[fx.Node, list[fx.Node]] = {}  # those of one root
    place = {node: at for at, node in enumerate(graph.nodes)}
    numbers: set[fx.Node] = set()
    for node, at in place.items():
        if is_number(node, numbers):
            numbers.add(node)
        target = _changed(node, modules)
        first = node.args[0] if node.args else None
        same = isinstance(first, fx.Node) and _is_view(node, modules)
        root[node] = root[target] if target is not None else root[first] if same else node  # type: ignore[index]
        before = [*sharing.setdefault(root[node], [])]
        sharing[root[node]].append(node)
        if target is None or target in numbers:
            continue
        later = partial(_is_later, place, at)
        for other in before:
            if not any(map(later, other.users)):
                continue
            now = node
            if other is not target:
                with graph.inserting_after(node):
                    now = graph.call_function(changed, (other, node))
                root[now] = root[node]
                sharing[root[node]].append(now)
            other.replace_all_uses_with(now, delete_user_cb=later)


def _is_later(place: dict[fx.Node, int], at: int, node: fx.Node) -> bool:
    return place.get(node, -1) > at


def changed(tensor: Any, by: Any) -> Any:
    """Stand, in a graph, for a tensor whose memory the call `by` has changed."""
    return tensor


def _changed(node: fx.Node, modules: dict[str, nn.Module]) -> fx.Node | None:
    """Return the tensor that a call may write into; None if it makes a new one."""
    found = node.kwargs.get("out")
    first = node.args[0] if node.args else node.kwargs.get("input")
    if node.op == "call_module":
        found = first if getattr(modules[str(node.target)], "inplace", False) is True else None
    elif node.op in ("call_function", "call_method") and found is None:
        name = torch_name(node)
        if getattr(operator, name, None) is node.target:
            written = name in WRITING_OPERATORS  # `and_` and `is_` write nothing
        else:
            special = name[:2] == "__" == name[-2:]
            written = name[2:-2] in WRITING_OPERATORS if special else name.endswith("_") or _asks_in_place(node)
        found = first if written else None
    return found if isinstance(found, fx.Node) else None


def _asks_in_place(node: fx.Node) -> bool:
    """Whether the argument `inplace` of a function is true, given by position or by keyword."""
    if node.kwargs.get("inplace") is True or True not in node.args:
        return node.kwargs.get("inplace") is True
    try:
        given = inspect.signature(node.target).bind(*node.args, **node.kwargs)  # type: ignore[arg-type]
    except (TypeError, ValueError):  # a function of C++ tells no signature, and none of them has the argument
        return False
    return given.arguments.get("inplace") is True


def _is_view(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return library_type(modules[str(node.target)]) in SAME_MODULES
    attribute = node.target is getattr and node.args[1] in ("data", "T", "mT", "H", "mH", "real", "imag")
    return attribute or (node.op in ("call_function", "call_method") and torch_name(node) in VIEWS)


def timm_notrace() -> tuple[tuple[type, ...], tuple[Callable[..., Any], ...]]:
    """Return the modules and functions that timm registers as not traceable; none if timm is not imported."""
    if "timm" not in sys.modules:
        return (), ()
    from timm.layers import get_notrace_functions, get_notrace_modules

    return tuple(get_notrace_modules()), tuple(get_notrace_functions())
