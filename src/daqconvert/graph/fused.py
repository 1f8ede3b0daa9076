"""Sites inside torch's own attention blocks, whose forward calls no layer."""

from __future__ import annotations

from torch import nn
from torch.nn.parameter import UninitializedParameter

from daqconvert.graph.functional import FunctionalSite
from daqconvert.layers.attention import PROJECTIONS, SCORES, VALUES, QuantMultiheadAttention, projection_weight
from daqconvert.spec import Call

_DERIVED: dict[type[nn.MultiheadAttention], type[nn.MultiheadAttention]] = {}
FUSED = (nn.TransformerEncoderLayer, nn.TransformerEncoder)


def attention_class(original: type[nn.MultiheadAttention]) -> type[nn.MultiheadAttention] | None:
    """Return the form of an attention block whose projections are sites; None where it has a forward of its own."""
    if original.forward is not nn.MultiheadAttention.forward:
        return None
    if original is nn.MultiheadAttention:
        return QuantMultiheadAttention
    if original not in _DERIVED:
        body = {"original": original, "__module__": original.__module__}
        _DERIVED[original] = type(f"Quant{original.__name__}", (QuantMultiheadAttention, original), body)
    return _DERIVED[original]


def attention_sites(paths: dict[str, nn.Module]) -> list[FunctionalSite]:
    """Return the input projections of every `nn.MultiheadAttention`.

    Args:
        paths: Any dotted name -> module.
    """
    found: dict[int, list[FunctionalSite]] = {}
    for path, module in paths.items():
        if not isinstance(module, nn.MultiheadAttention) or id(module) in found:
            continue
        if attention_class(type(module)) is not None:
            found[id(module)] = [_projection(path, module, name) for name in PROJECTIONS]
            found[id(module)] += [_product(path, name) for name in (SCORES, VALUES)]
    return [site for sites in found.values() for site in sites]


def _product(path: str, name: str) -> FunctionalSite:
    prefix = f"{path}." if path else ""
    call = Call(name, (path,), f"{prefix}{name}_site", (), True)
    return FunctionalSite(f"{prefix}{name}", name, call, (name,), nonnegative=name == VALUES)


def _projection(path: str, module: nn.MultiheadAttention, name: str) -> FunctionalSite:
    prefix = f"{path}." if path else ""
    tensor = f"{prefix}{'in_proj_weight' if module.in_proj_weight is not None else f'{name}_weight'}"
    weight = projection_weight(module, name)
    lazy = isinstance(weight, UninitializedParameter)
    return FunctionalSite(
        f"{prefix}{name}", "linear", Call("linear", (path,), f"{prefix}{name}_site", (tensor,)), (name,),
        () if lazy else tuple(weight.shape), direct=True,
        reason="lazy: its weight has no shape before a first forward" if lazy else "",
    )  # fmt: skip
