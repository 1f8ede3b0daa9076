"""Tracing a model with torch.fx for its dataflow: sites and untraceable library modules stay leaves."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import fx, nn

from daqconvert.layers.registry import is_site_type


class SiteTracer(fx.Tracer):
    """`torch.fx.Tracer` whose leaves are the sites, torch's own modules, and what timm registers as not traceable."""

    def __init__(self, notrace_modules: tuple[type, ...] = (), notrace_functions: tuple[Callable[..., Any], ...] = ()):
        super().__init__(autowrap_functions=notrace_functions)
        self.notrace_modules = notrace_modules

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Return whether `m` becomes one node."""
        if is_site_type(m) or isinstance(m, self.notrace_modules):
            return True
        return super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module) -> fx.Graph | None:
    """Return the graph of a model's forward, or None where fx cannot follow it.

    The model should be in evaluation mode; it is not changed.
    """
    try:
        return SiteTracer(*_timm_notrace()).trace(model)
    except Exception:  # NOTE: the model's own code runs here with proxies and may raise anything
        return None


def _timm_notrace() -> tuple[tuple[type, ...], tuple[Callable[..., Any], ...]]:
    if "timm" not in sys.modules:
        return (), ()
    from timm.layers import get_notrace_functions, get_notrace_modules

    return tuple(get_notrace_modules()), tuple(get_notrace_functions())
