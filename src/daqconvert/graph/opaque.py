"""Helper functions that torch.fx cannot look into: found by the error that they cause, and taken as one node.

`pad_same(x, ...)` decides on sizes, so a trace of the forward that calls it fails. It computes no product, as a rule:
the trace is made again with that function as a node. (One that multiplies by a weight it is given: `layers.handles`.)
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType, TracebackType
from typing import Any

from torch import fx
from torch.utils._pytree import tree_leaves

MOST = 8  # functions that one forward may need

Place = tuple[dict[str, Any], str]
"""Where a function is called by name: the globals of the caller, and the name."""


def trace_around(trace: Callable[[], fx.Graph]) -> fx.Graph:
    """Trace, and again with a function as one node for as long as one is in the way.

    Args:
        trace: Makes the graph.

    Raises:
        Exception: Whatever tracing raises where no function of the module's library is to blame.
    """
    places: list[Place] = []
    while True:
        try:
            with _as_nodes(places):
                return trace()
        except Exception as error:
            place = _culprit(error.__traceback__)
            if place is None or len(places) == MOST:
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
    """The innermost function outside torch that an error came through and that is called by a global name."""
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
