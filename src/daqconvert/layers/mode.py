"""Contexts that put a model in training or evaluation mode for a while; every module gets its own mode back.

Evaluation mode is also needed to read a weight that is computed from parameters. A parametrization may have state that
changes whenever the weight is read in training mode (`spectral_norm` takes a step of its power iteration), and only
the model's own forward may change it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from torch import nn


def evaluating(model: nn.Module) -> AbstractContextManager[nn.Module]:
    """Put every module of a model, or one layer, in evaluation mode; give each its own mode back afterwards.

    Example:
        >>> layer = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
        >>> with evaluating(layer):
        ...     same = torch.equal(layer.weight, layer.weight)
        >>> same, layer.training
        (True, True)
    """
    return in_mode(model, False)


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[nn.Module]:
    """Put every module in one mode; give each its own mode back afterwards."""
    before = [(module, module.training) for module in model.modules()]
    for module, _ in before:
        module.training = training
    try:
        yield model
    finally:
        for module, mode in before:
            module.training = mode
