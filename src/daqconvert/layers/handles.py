"""A weight that is handed to a function which torch.fx cannot look into: what multiplies by it goes through its site.

torchvision's `shifted_window_attention(x, self.qkv.weight, self.proj.weight, ...)` decides on shapes, so it stays one node
of the graph. It is given handles instead of the weights, and torch asks a handle before it multiplies by one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils._pytree import tree_map_only

from daqconvert.layers.frozen_site import FrozenSite
from daqconvert.layers.functional import call_site
from daqconvert.layers.operations import ALIASES, LAYER_FUNCTIONS
from daqconvert.layers.site import QuantizedSite


class SiteWeight:
    """Stands for the weight of a layer: `F.linear(x, handle)` is computed by the layer's site, all else by the weight.

    Args:
        holder: A quantized or frozen layer.
    """

    def __init__(self, holder: Any) -> None:
        self.holder = holder

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Compute a product by the site of its weight; any other function with the weight itself."""
        kwargs = kwargs or {}
        name = ALIASES.get(func)
        weight = args[1] if len(args) > 1 else kwargs.get("weight")
        if name in LAYER_FUNCTIONS and isinstance(weight, SiteWeight):
            holder = weight.holder
            plain = None if isinstance(holder, FrozenSite) and holder.settings.w_bits is not None else holder.weight
            if len(args) > 1:
                return call_site(holder, str(name), 1, (args[0], plain, *args[2:]), kwargs)
            return call_site(holder, str(name), 1, args, {**kwargs, "weight": plain})
        args, kwargs = tree_map_only(SiteWeight, lambda handle: handle.holder.weight, (args, kwargs))
        return func(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.holder.weight, name)


def handle(holder: Any) -> Any:
    """Return what stands for a layer's weight in a call: a handle, or the weight where the layer has no quantizers."""
    return SiteWeight(holder) if isinstance(holder, (QuantizedSite, FrozenSite)) else holder.weight
