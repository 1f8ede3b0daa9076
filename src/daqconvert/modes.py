"""Context managers that switch a model for a while and put everything back, on exceptions too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from daqconvert.layers.base import QuantizedLayer


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Put every module in evaluation mode; give each its own mode back afterwards."""
    before = [(module, module.training) for module in model.modules()]
    for module, _ in before:
        module.training = False
    try:
        yield model
    finally:
        for module, mode in before:
            module.training = mode


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Compute what the original model computes, with the current weights, while the context lasts.

    Args:
        model: A quantized model.

    Yields:
        The same model; quantizers are back afterwards, on exceptions too.

    Example:
        >>> import daqconvert as dq
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> qmodel, x = dq.quantize(model, w_bits=4, a_bits=4), torch.ones(1, 4)
        >>> with dq.disabled(qmodel):
        ...     bool((qmodel(x) == model(x)).all())
        True
    """
    layers = [module for module in model.modules() if isinstance(module, QuantizedLayer)]
    before = [layer.enabled for layer in layers]
    for layer in layers:
        layer.enabled = False
    try:
        yield model
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """Return the quantized layers of a model by dotted name, each once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLayer)}
