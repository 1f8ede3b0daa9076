"""The verb `freeze`: integer codes instead of weights, one scale and zero point instead of each quantizer.

`freeze` copies the model and freezes the sites of the copy in place. The copy shares the weights that become codes
(`dropped_weights`) with the original, so that memory never holds two copies of them. Any of these weights that the
frozen model still has at the end are then copied (`own_parameters`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from daqconvert.convert import require_quantized
from daqconvert.errors import CalibrationError
from daqconvert.graph import integer_sites
from daqconvert.graph.apply import drop_projection_weights
from daqconvert.graph.rewrite import CODES, Rewritten, rewritten_class
from daqconvert.kept_plan import keep_plan, reconcile
from daqconvert.layers.attention import QuantMultiheadAttention
from daqconvert.layers.base import QuantizedLayer
from daqconvert.layers.call_holders import CallHolder, FrozenCallHolder, OwnCallHolder
from daqconvert.layers.frozen_site import FrozenSite, drop_quantizers, frozen_values
from daqconvert.layers.lookup import frozen_class
from daqconvert.layers.output_quantizers import OutputQuantizer, freeze_output_quantizer
from daqconvert.models import copy_model, quantized_sites
from daqconvert.quantizers import WeightQuantizer


def freeze(qmodel: nn.Module) -> nn.Module:
    """Return a copy of a quantized model that holds integer codes instead of weights, and computes the same.

    Each weight becomes uint8 codes `0 .. 2**w_bits - 1`, each quantizer a scale and, for inputs, a zero point. Every
    element of the output is identical to that of the quantized model in evaluation mode, and batch norms stay as they
    are. Only sites with `deploy="integer"` differ: their batch norms are folded in and their outputs rounded to codes.

    Args:
        qmodel: A quantized and calibrated model; it is not changed.

    Returns:
        A model of the same class in evaluation mode. It has no trainable parameters.

    Raises:
        CalibrationError: If bounds were never set. The message names the layers.
        ConversionError: If the model is not quantized.
        FrozenError: If the model is frozen already.

    Example:
        >>> import torch, daqconvert as dq
        >>> qmodel = dq.quantize(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), w_bits=4, a_bits=4)
        >>> x = torch.randn(8, 4)
        >>> report = dq.calibrate(qmodel, [x])
        >>> torch.equal(dq.freeze(qmodel)(x), qmodel.eval()(x))
        True
    """
    sites = require_quantized(qmodel, "freeze")
    missing = [
        name or "(root)"
        for name, site in sites.items()
        if any(q is not None and not q.ready for q in (site.weight_quantizer, site.input_quantizer))
    ]
    if missing:
        raise CalibrationError(
            f"freeze: {len(missing)} of {len(sites)} layers have bounds that were never set: "
            f"{', '.join(missing[:4])}{', ...' if len(missing) > 4 else ''}. "
            "Run daqconvert.calibrate(model, batches) or finetune first."
        )
    found = reconcile(qmodel, "freeze")
    plan = found.plan
    found.require_known(qmodel, "freeze")
    weights = dropped_weights(qmodel)  # shared with the copy, because copying them all would double the memory
    frozen = copy_model(qmodel, sharing=weights)
    for site, other in zip(sites.values(), quantized_sites(frozen).values(), strict=True):
        old, new = site.weight_quantizer, other.weight_quantizer
        if isinstance(old, WeightQuantizer) and isinstance(new, WeightQuantizer):
            new.take_memory(old)  # if the model has been called, `old` remembers the codes of the weight
    for name, site in quantized_sites(frozen).items():
        site.layer_name = found.names[name]
    freeze_sites(frozen)
    integer_sites(frozen, plan)
    own_parameters(frozen, weights)
    for module in frozen.modules():
        module.training = False
    frozen.requires_grad_(False)
    keep_plan(frozen, plan)
    return frozen


def is_frozen(model: nn.Module) -> bool:
    """Whether a model holds a frozen layer."""
    return any(isinstance(module, FrozenSite) for module in model.modules())


def freeze_sites(model: nn.Module) -> None:
    """Turn every site of a calibrated model into its frozen form, in place."""
    modules = list(model.modules())
    # the weight of a call site may be computed from parameters that the loop below removes
    values = {id(m): frozen_values(m) for m in modules if isinstance(m, (CallHolder, OwnCallHolder))}
    for module in modules:
        if isinstance(module, QuantizedLayer):
            frozen_class(module.original).freeze(module)
        elif isinstance(module, OutputQuantizer):
            freeze_output_quantizer(module, frozen_values(module))
        elif id(module) in values:
            _freeze_call(module, values[id(module)])
    for module in modules:
        if isinstance(module, Rewritten):
            module.rewriting = module.rewriting.frozen()
            module.rewriting.drop_unused(module)
        elif isinstance(module, QuantMultiheadAttention):
            drop_projection_weights(module)


def _freeze_call(module: Any, values: dict[str, Tensor]) -> None:
    settings, name = module.settings, module.layer_name
    dtype = module.output_scale.dtype
    drop_quantizers(module)
    holder = module
    if isinstance(module, CallHolder):
        del holder.source
        holder.__class__ = FrozenCallHolder
    else:
        holder = FrozenCallHolder()
        holder.output_dims = module.output_dims
        for attribute in ("weight_of", "output_dims", "settings", "layer_name", "watchers"):
            delattr(module, attribute)
        module.__class__ = rewritten_class(module.original, (), "Frozen", tuple(module.rewriting.methods))
        module.add_module(CODES, holder)
    holder.training = False
    holder.hold(settings, name, dtype, values)


def dropped_weights(model: nn.Module) -> list[Tensor]:
    """Return the parameters of a quantized model that freezing reads and drops, and that nothing else refers to.

    Parameters that a layer computes its weight from (pruning, weight norm, a parametrization) are not among them,
    because `settle_weight` writes into them.
    """
    found = {id(p): p for module in model.modules() for p in _dropped(module) if p is not None}
    for module in model.modules():
        attributes = [value for key, value in vars(module).items() if key != "_parameters"]
        for leaf in tree_leaves(attributes):
            found.pop(id(leaf), None)
    return list(found.values())


def _dropped(module: nn.Module) -> Iterator[Tensor | None]:
    if isinstance(module, QuantizedLayer) and isinstance(module.weight_quantizer, WeightQuantizer):
        yield module._parameters.get("weight")
    if isinstance(module, Rewritten):
        yield from (module._parameters.get(name) for name in module.rewriting.unused)
    if isinstance(module, QuantMultiheadAttention):
        yield module._parameters.get("in_proj_weight")


def own_parameters(model: nn.Module, shared: Iterable[Tensor]) -> None:
    """Give a frozen model its own copies of the `shared` parameters that it still has; tied parameters stay tied.

    An embedding that is tied to a frozen layer still has its weight, for example.
    """
    others, copies = {id(p) for p in shared}, dict[int, Any]()
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in others:
                with torch.no_grad():
                    copies.setdefault(id(parameter), nn.Parameter(parameter.clone(), parameter.requires_grad))
                module._parameters[name] = copies[id(parameter)]
