"""Copies of a model, and context managers that switch one for a while and put everything back, on exceptions too.

`cache_weights` alone switches for good.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from daqconvert.errors import ConversionError, FrozenError
from daqconvert.layers.frozen_site import FrozenSite
from daqconvert.layers.mode import evaluating as evaluating
from daqconvert.layers.mode import in_mode as in_mode
from daqconvert.layers.site import QuantizedSite


def copy_model(model: nn.Module, *, to_look_at: bool = False, sharing: Iterable[Tensor] = ()) -> nn.Module:
    """Return a deep copy of a model.

    Tensors that a forward left in an attribute together with their graph (a cached activation, the weight that the old
    `weight_norm` computes) are copied without it; `copy.deepcopy` alone refuses them.

    Args:
        model: Any module; not changed.
        to_look_at: The copy shares the parameters and has no forward hooks: whatever its code and the user's hooks do
            while it is traced, the user's model never sees it.
        sharing: Tensors that the copy has in common with the model.

    Raises:
        ConversionError: If something in the model cannot be copied.
    """
    memo: dict[int, Any] = {id(p): p for p in model.parameters()} if to_look_at else {id(t): t for t in sharing}
    for module in model.modules():
        left = [t for t in tree_leaves(vars(module)) if isinstance(t, Tensor) and t.grad_fn is not None]
        memo |= {id(t): t.detach().clone() for t in left}
    try:
        found = copy.deepcopy(model, memo)
    except Exception as error:  # NOTE: runs the __deepcopy__ and __reduce__ of whatever the model holds
        raise ConversionError(
            f"{type(model).__name__} cannot be copied ({error}). daqconvert never changes the model it is given, so "
            "copy.deepcopy(model) has to work: take out what cannot be copied (a lock, a file, a generator)."
        ) from error
    for module in found.modules() if to_look_at else ():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return found


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Compute what the original model computes, with the current weights, while the context lasts.

    Args:
        model: A quantized model.

    Yields:
        The same model; quantizers are back afterwards, on exceptions too.

    Raises:
        FrozenError: If the model is frozen: it has no float weights any more.

    Example:
        >>> import daqconvert as dq
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> qmodel, x = dq.quantize(model, w_bits=4, a_bits=4), torch.ones(1, 4)
        >>> with dq.disabled(qmodel):
        ...     bool((qmodel(x) == model(x)).all())
        True
    """
    frozen = [name for name, module in model.named_modules() if isinstance(module, FrozenSite)]
    if frozen:
        raise FrozenError(
            f"disabled: {frozen[0] or 'the model'} is frozen and holds no float weight to compute with. "
            "Use the quantized model it was frozen from, or the original."
        )
    layers = [module for module in model.modules() if isinstance(module, QuantizedSite)]
    before = [layer.enabled for layer in layers]
    for layer in layers:
        layer.enabled = False
    try:
        yield model
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled


def cache_weights(frozen: nn.Module, enabled: bool = True) -> int:
    """Trade memory for speed: keep what each frozen weight decodes to, instead of decoding it in every forward.

    A frozen model holds one byte a weight and decodes a layer's codes whenever it computes. This keeps the operands
    besides, 4 bytes a weight in a float32 model; values do not change. They stand in no state dict, artifact or
    exported file, move with `.to()` and `.half()`, and follow what is loaded. A compiled model takes what is kept:
    after a write into `weight_codes` by hand it needs this call again.

    Args:
        frozen: From `freeze` or `load`; changed in place.
        enabled: False gives the memory back.

    Returns:
        The bytes that are kept now, beside the model itself.

    Raises:
        FrozenError: If the model holds no frozen layer.

    Example:
        >>> import daqconvert as dq
        >>> qmodel = dq.quantize(nn.Linear(4, 4), w_bits=4, a_bits=None, first=None, last=(4, None))
        >>> frozen = dq.freeze(qmodel)
        >>> dq.cache_weights(frozen), dq.cache_weights(frozen, enabled=False)
        (64, 0)
    """
    sites = [module for module in frozen.modules() if isinstance(module, FrozenSite)]
    if not sites:
        raise FrozenError(
            f"cache_weights: {type(frozen).__name__} has no frozen layer. Call daqconvert.freeze(qmodel) first."
        )
    return sum(site.keep_operand(enabled) for site in sites)


@contextmanager
def unchanged_on_error(layers: Iterable[QuantizedSite]) -> Iterator[None]:
    """Give bounds, flags, signs and output scales of these layers back as they were if the block raises."""
    layers = list(layers)
    quantizers = [q for layer in layers for q in (layer.weight_quantizer, layer.input_quantizer) if q is not None]
    states = [{key: value.clone() for key, value in q.state_dict().items()} for q in quantizers]
    scales = [layer.output_scale.detach().clone() for layer in layers]
    try:
        yield
    except BaseException:
        for quantizer, state in zip(quantizers, states, strict=True):
            quantizer.load_state_dict(state)
        for layer, scale in zip(layers, scales, strict=True):
            layer.output_scale.data.copy_(scale)
        raise


def quantized_layers(model: nn.Module) -> dict[str, QuantizedSite]:
    """Return what holds quantizers in a model by dotted name, each once: layers, and sites that are calls."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedSite)}


def float_copy(qmodel: nn.Module) -> nn.Module:
    """Return a copy of a quantized model that computes in float, in evaluation mode and without gradients."""
    found = copy.deepcopy(qmodel)
    for site in quantized_layers(found).values():
        site.enabled = False
    return found.eval().requires_grad_(False)
