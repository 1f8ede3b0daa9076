"""Why a layer is left alone, and what else there is to say about it."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from daqconvert.graph.view import View
from daqconvert.layers.lookup import quantized_class

REPLACED = "its forward was replaced on the object itself, so a quantized class would never run"
RECURRENT = "recurrent layer: its products run in one fused kernel"


def layer_reason(name: str, module: nn.Module, view: View) -> str:
    """Return why a layer cannot be converted; empty if it can.

    Args:
        name: The name it goes by.
        module: The layer.
        view: What is seen of the model.
    """
    parent = view.paths.get(name.rpartition(".")[0]) if name else None
    kind, weight = type(module).__name__, getattr(module, "weight", None)
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return RECURRENT
    if "forward" in vars(module):
        return REPLACED
    if any(isinstance(p, UninitializedParameter) for p in module.parameters()):
        return "lazy: its weight has no shape before a first forward"
    if isinstance(parent, nn.MultiheadAttention) and type(parent).forward is not nn.MultiheadAttention.forward:
        return f"{type(parent).__name__} uses its weight without calling it"
    if isinstance(weight, Tensor) and not weight.is_floating_point():
        return f"its weight is {str(weight.dtype).removeprefix('torch.')}"
    if isinstance(weight, Tensor) and weight.numel() == 0:
        return "its weight is empty"
    if name in view.functional:
        return view.functional[name].reason
    if quantized_class(type(module)) is None:
        if name in view.failed:
            return f"{kind} has a forward of its own that torch.fx cannot follow: {view.failed[name]}"
        return f"no quantized form is registered for exactly this class ({kind})"
    return view.read.get(name, "")


def site_notes(view: View) -> dict[str, tuple[str, ...]]:
    """Return remarks for the plan's rows: other names, shared weights, what is never called.

    Args:
        view: What is seen of the model.
    """
    notes: dict[str, list[str]] = {}
    for alias, name in view.aliases.items():
        if alias != name:
            notes.setdefault(name, []).append(f"also named {alias}")
    owners: dict[int, str] = {}
    for path, module in view.paths.items():
        for parameter in module._parameters.values():
            owners.setdefault(id(parameter), view.aliases.get(path, path))
    called = None if view.flow is None else set(view.flow.order)
    for name, module in view.named.items():
        weight = module._parameters.get("weight")
        if weight is not None and owners[id(weight)] != name:
            notes.setdefault(name, []).append(f"shares its weight with {owners[id(weight)] or '(root)'}")
        if called is not None and name not in called and not layer_reason(name, module, view):
            notes.setdefault(name, []).append("not called in evaluation")
    for name, site in view.functional.items():
        if not site.reason and site.call.tensors:
            where = ", ".join(path or "the model" for path in site.call.modules)
            notes.setdefault(name, []).append(f"{site.call.function} called by {where}" if where != name else "")
    return {name: tuple(line for line in lines if line) for name, lines in notes.items()}
