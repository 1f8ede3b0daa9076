"""The verb `freeze`: hard rounding, integer codes instead of weights."""

from __future__ import annotations

from torch import nn

from daqconvert.convert import PLAN_ATTRIBUTE, current_plan, require_quantized
from daqconvert.errors import CalibrationError
from daqconvert.graph import coded_weights, freeze_sites, integer_sites, own_parameters
from daqconvert.layers.frozen_site import FrozenSite
from daqconvert.modes import copy_model, quantized_layers
from daqconvert.quantizers import WeightQuantizer


def freeze(qmodel: nn.Module) -> nn.Module:
    """Return a copy of a quantized model that holds integer codes and computes exactly what it computes.

    Weights become uint8 codes `0 .. 2**w_bits - 1`, quantizers become one scale (and zero point) each; batch norm is
    not folded. In evaluation mode the output is identical, every element.

    Args:
        qmodel: Quantized and calibrated; not changed.

    Returns:
        A model of the same class in evaluation mode, without anything to train.

    Raises:
        CalibrationError: If bounds were never set; names the layers.
        FrozenError: If the model is frozen already.

    Example:
        >>> import torch, daqconvert as dq
        >>> qmodel = dq.quantize(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), w_bits=4, a_bits=4)
        >>> x = torch.randn(8, 4)
        >>> report = dq.calibrate(qmodel, [x])
        >>> torch.equal(dq.freeze(qmodel)(x), qmodel.eval()(x))
        True
    """
    layers = require_quantized(qmodel, "freeze")
    missing = [
        name or "(root)"
        for name, layer in layers.items()
        if any(q is not None and not q.ready for q in (layer.weight_quantizer, layer.input_quantizer))
    ]
    if missing:
        raise CalibrationError(
            f"freeze: {len(missing)} of {len(layers)} layers have bounds that were never set: "
            f"{', '.join(missing[:4])}{', ...' if len(missing) > 4 else ''}. "
            "Run daqconvert.calibrate(model, batches) or finetune first."
        )
    plan = current_plan(qmodel)
    weights = coded_weights(qmodel)  # read where they lie: a copy of all would double the memory
    frozen = copy_model(qmodel, sharing=weights)
    for layer, other in zip(layers.values(), quantized_layers(frozen).values(), strict=True):
        old, new = layer.weight_quantizer, other.weight_quantizer
        if isinstance(old, WeightQuantizer) and isinstance(new, WeightQuantizer):
            new.take_memory(old)  # its codes, if it has been called
    freeze_sites(frozen)
    integer_sites(frozen, plan)
    own_parameters(frozen, weights)
    for module in frozen.modules():
        module.training = False
    frozen.requires_grad_(False)
    object.__setattr__(frozen, PLAN_ATTRIBUTE, plan)
    return frozen


def is_frozen(model: nn.Module) -> bool:
    """Whether a model holds a frozen layer."""
    return any(isinstance(module, FrozenSite) for module in model.modules())
