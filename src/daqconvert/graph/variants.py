"""Tracing a module's own forward by torch.fx in every way that it can be called.

An fx graph is one path through the code. The path usually depends on `self.training`, on which optional arguments are
given, and on flags. Therefore each combination has its own graph (a `Variant`), and a call picks the one that fits.

A helper function can stop the trace: `pad_same(x, ...)`, for example, branches on sizes. Usually it computes no
product. So the function is found from the traceback of the error, and the trace is made again with the function as a
single node. (A helper that multiplies by a weight which it is given gets a `SiteWeight`: `layers.call_holders`.)
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType, TracebackType
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves

from daqconvert.graph.scan import inner_functions
from daqconvert.graph.trace import SiteTracer, timm_notrace
from daqconvert.models import in_mode

MOST_CHOICES = 4
"""At most this many arguments are varied; with training and evaluation mode there are at most 32 graphs."""
MOST_HELPERS = 8
"""At most this many functions of one forward become single nodes because they stop the trace."""
GIVEN = "given"
"""The state of an argument whose value is given and is neither None, a flag, nor the default."""

CONTEXTS = "contexts"
"""Key in a node's `meta` of the contexts that it is made in, outermost first."""
Context = tuple[Any, ...]
"""A context that code enters: its kind in `KINDS`, and the arguments to make it with."""
KINDS: dict[str, tuple[Any, Callable[[Any], tuple[Any, ...]]]] = {
    "no_grad": (torch.no_grad, lambda _: ()),
    "enable_grad": (torch.enable_grad, lambda _: ()),
    "set_grad_enabled": (torch.set_grad_enabled, lambda context: (context.mode,)),
    "inference_mode": (torch.inference_mode, lambda context: (context.mode,)),
    "autocast": (
        torch.autocast,
        lambda context: (context.device, context.fast_dtype, context._enabled, context._cache_enabled),
    ),
}
"""Contexts that change what is computed or what learns -> their class, and how to read their arguments."""


class Contexts:
    """The contexts of `KINDS` that a generated forward has entered and not yet left."""

    def __init__(self) -> None:
        self.leaving: list[Callable[[], Any]] = []

    def enter(self, kind: str, *args: Any) -> None:
        """Enter a context, by the functions that torch has for graphs: `torch.compile` cannot follow classes here."""
        if kind == "autocast":
            mode = torch.amp.autocast_mode._enter_autocast(*args)
            self.leaving.append(lambda: torch.amp.autocast_mode._exit_autocast(mode))
        elif kind == "inference_mode":
            guard = torch.autograd.grad_mode._enter_inference_mode(*args)
            self.leaving.append(lambda: torch.autograd.grad_mode._exit_inference_mode(guard))
        else:
            before, wanted = torch.is_grad_enabled(), args[0] if args else kind == "enable_grad"
            torch._C._set_grad_enabled(wanted)
            self.leaving.append(lambda: torch._C._set_grad_enabled(before))

    def leave(self) -> None:
        """Leave the context that was entered last."""
        self.leaving.pop()()

    def close(self) -> None:
        """Leave all contexts, as after an error."""
        while self.leaving:
            self.leave()


Place = tuple[dict[str, Any], str]
"""Where a function is called by name: the globals of the caller, and the name."""


@dataclass(frozen=True)
class Signature:
    """The arguments of a forward, and the values that a trace tries for them.

    Attributes:
        names: All arguments in order, without `self`.
        defaults: Argument -> its default; only arguments that have one.
        choices: Argument whose default is None or a flag, because these choose a path -> the values that are tried.
            For a default of None they are None and `GIVEN` (a placeholder).
    """

    names: tuple[str, ...]
    defaults: dict[str, Any]
    choices: dict[str, tuple[Any, ...]]

    def state(self, training: bool, values: dict[str, Any]) -> tuple[Any, ...]:
        """Return the key of the graph for a call with these arguments: `training` and a state for each default."""
        return (training, *(_state(values.get(n, d), d) for n, d in self.defaults.items()))


def read_signature(module: nn.Module, method: str = "forward") -> Signature | None:
    """Return the signature of a module's forward or another method; None if it takes only `*args` or `**kwargs`."""
    named: list[inspect.Parameter] = []
    original = getattr(type(module), method)
    functions: list[Callable[..., Any]] = [original, *inner_functions(original)]
    for function in functions:  # a decorator may take `*args`
        parameters = list(inspect.signature(function).parameters.values())[1:]
        named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        if named:
            break
    if not named:
        return None
    defaults = {p.name: p.default for p in named if p.default is not p.empty}
    varied = [n for n, d in defaults.items() if d is None or isinstance(d, bool)][:MOST_CHOICES]
    choices = {n: (None, GIVEN) if defaults[n] is None else (defaults[n], not defaults[n]) for n in varied}
    return Signature(tuple(p.name for p in named), defaults, choices)


def _state(value: Any, default: Any) -> Any:
    """Return None or a flag unchanged, `"default"` for any other value that equals the default, `GIVEN` otherwise."""
    if value is None or isinstance(value, bool):
        return value
    same = value is default or (type(value) in (int, float, str, tuple) and value == default)
    return "default" if same else GIVEN


@dataclass(frozen=True)
class Variant:
    """One path through a forward.

    Attributes:
        state: Key of the calls that take this path, from `Signature.state`.
        arguments: The arguments that the graph takes, in order.
        graph: The graph of the forward alone; children are single nodes.
    """

    state: tuple[Any, ...]
    arguments: tuple[str, ...]
    graph: fx.Graph


class Untraceable(Exception):
    """fx cannot follow a forward; the message is the reason."""


def trace_variants(module: nn.Module, every: bool = True, method: str = "forward") -> tuple[Signature, list[Variant]]:
    """Trace a module's own forward in every way it can be called; the plain calls (all defaults) come first.

    The module should be a copy of the user's, since its code runs here with proxies. Without `every`, these calls are
    traced, which is enough to find what the forward multiplies: the plain calls in evaluation and in training, and in
    evaluation a call with every optional argument given and calls with one flag reversed.

    Raises:
        Untraceable: If fx cannot follow the plain call, in evaluation or in training.
    """
    signature = read_signature(module, method)
    if signature is None:
        raise Untraceable("it takes *args or **kwargs alone")
    found = []
    for training, chosen in _combinations(signature, every):
        plain = all(value == signature.defaults[name] for name, value in chosen.items())
        try:
            found.append(_trace(module, signature, training, chosen, method))
        except Exception as error:  # NOTE: the model's own code runs here with proxies and may raise anything
            if plain:
                raise Untraceable(str(error).strip().split("\n")[0] or type(error).__name__) from error
    return signature, found


def _combinations(signature: Signature, every: bool) -> Iterator[tuple[bool, dict[str, Any]]]:
    if not every:
        yield from (
            (training, {n: values[0] for n, values in signature.choices.items()}) for training in (False, True)
        )
        whole = {n: GIVEN if GIVEN in values else values[0] for n, values in signature.choices.items()}
        if GIVEN in whole.values():
            yield False, whole
        for name, values in signature.choices.items():
            if GIVEN not in values:
                yield False, whole | {name: values[1]}
        return
    for values in itertools.product(*signature.choices.values()):
        for training in (False, True):
            yield training, dict(zip(signature.choices, values, strict=True))


def _trace(module: nn.Module, signature: Signature, training: bool, chosen: dict[str, Any], method: str) -> Variant:
    required = [n for n in signature.names if n not in signature.defaults]
    given = [n for n in signature.names if n in required or chosen.get(n) == GIVEN]
    fixed = {n: v for n, v in signature.defaults.items() if n not in given}
    fixed |= {n: v for n, v in chosen.items() if v != GIVEN}
    with in_mode(module, training):
        graph = trace_around(lambda: OwnForward(signature.names, given, fixed, method).trace(module))
    if any(node.op == "get_attr" and str(node.target).startswith("_tensor_constant") for node in graph.nodes):
        raise Untraceable("it makes a tensor of its own")
    state = (training, *(GIVEN if n in given else _state(fixed[n], d) for n, d in signature.defaults.items()))
    return Variant(state, tuple(given), graph)


class OwnForward(SiteTracer):
    """Traces one module's own forward: children are nodes, arguments in `given` placeholders, all others `fixed`.

    A node that is made inside `torch.no_grad`, `torch.autocast` and the like has these contexts in `meta[CONTEXTS]`.
    """

    trace_asserts = True
    proxy_buffer_attributes = True

    def __init__(self, order: tuple[str, ...], given: list[str], fixed: dict[str, Any], method: str) -> None:
        super().__init__(*timm_notrace(), alone=True)
        self.order, self.names, self.fixed = order, given, fixed
        self.traced_func_name = method
        self.contexts: list[Context] = []
        self.modes = _modes()

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Return the graph of the root's forward."""
        with torch.set_grad_enabled(torch.is_grad_enabled()), _recording(self):
            return super().trace(root, concrete_args)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Return a new node, which remembers the contexts that it is made in.

        Raises:
            Untraceable: If the code switched gradients on or off without a context.
        """
        if _modes() != self.modes:
            raise Untraceable("it switches gradients or inference mode without a `with` statement")
        node = super().create_node(*args, **kwargs)
        node.meta[CONTEXTS] = tuple(self.contexts)
        return node

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Return the value of an attribute that the traced code reads.

        Shapes of parameters are constants in the graph, so that a forward that reads a shape does not need the weight.
        """
        self.param_shapes_constant = isinstance(attr_val, nn.Parameter)  # torch.fx supports this for parameters only
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """Return the root's arguments in the order of the signature: placeholders, or fixed values."""
        args: list[Any] = [self.root]
        for name in self.order:
            given = name in self.names
            args.append(self.create_proxy("placeholder", name, (), {}) if given else self.fixed[name])
        return root_fn, args


def _modes() -> tuple[bool, bool]:
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled()


@contextmanager
def _recording(tracer: OwnForward) -> Iterator[None]:
    """Let a tracer know which of the contexts in `KINDS` the traced code enters and leaves; fx ignores them."""

    def entering(kind: str, enter: Callable[..., Any]) -> Callable[..., Any]:
        def entered(context: Any) -> Any:
            result = enter(context)
            tracer.contexts.append((kind, *KINDS[kind][1](context)))
            tracer.modes = _modes()
            return result

        return entered

    def leaving(leave: Callable[..., Any]) -> Callable[..., Any]:
        def left(context: Any, *error: Any) -> Any:
            result = leave(context, *error)
            tracer.contexts.pop()
            tracer.modes = _modes()
            return result

        return left

    kept = [(kind, made, made.__enter__, made.__exit__) for kind, (made, _) in KINDS.items()]
    try:
        for kind, made, enter, leave in kept:
            made.__enter__, made.__exit__ = entering(kind, enter), leaving(leave)
        yield
    finally:
        for _, made, enter, leave in kept:
            made.__enter__, made.__exit__ = enter, leave


def trace_around(trace: Callable[[], fx.Graph]) -> fx.Graph:
    """Return the graph that `trace` makes, with each function that stops the trace as a single node.

    Raises:
        Exception: The error of the trace, if no function outside torch caused it or too many functions did.
    """
    places: list[Place] = []
    while True:
        try:
            with _as_nodes(places):
                return trace()
        except Exception as error:
            place = _culprit(error.__traceback__)
            if place is None or len(places) == MOST_HELPERS:
                raise
            places.append(place)


@contextmanager
def _as_nodes(places: list[Place]) -> Iterator[None]:
    before = [(names, name, names[name]) for names, name in places]
    for names, name, function in before:
        names[name] = _as_node(function)
    try:
        yield
    finally:
        for names, name, function in reversed(before):
            names[name] = function


def _as_node(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def node(*args: Any, **kwargs: Any) -> Any:
        proxies = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, fx.Proxy)]
        if not proxies:
            return function(*args, **kwargs)
        return proxies[0].tracer.create_proxy("call_function", function, args, kwargs)

    return node


def _culprit(trace: TracebackType | None) -> Place | None:
    """Return the innermost function outside torch that an error passed through and that a global name refers to."""
    frames = []
    while trace is not None:
        frames.append(trace.tb_frame)
        trace = trace.tb_next
    for caller, callee in reversed(list(itertools.pairwise(frames))):
        name = callee.f_code.co_name
        function = caller.f_globals.get(name)
        known = isinstance(function, FunctionType) and function.__code__ is callee.f_code
        if known and not function.__module__.startswith(("torch.", "daqconvert.")):
            return caller.f_globals, name
    return None
