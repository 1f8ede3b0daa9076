"""Reading a weight that is computed from parameters: looking at it must not change the module.

A parametrization may have state of its own that moves whenever the weight is read in training mode: `spectral_norm`
takes a step of its power iteration. Only the model's own forward may do that.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def still(module: nn.Module) -> Iterator[None]:
    """Put a module and all inside it in evaluation mode while a weight is read; give each its own mode back.

    Args:
        module: The module that the weight is read from.

    Example:
        >>> layer = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
        >>> with still(layer):
        ...     same = torch.equal(layer.weight, layer.weight)
        >>> same, layer.training
        (True, True)
    """
    before = [(part, part.training) for part in module.modules()]
    for part, _ in before:
        part.training = False
    try:
        yield
    finally:
        for part, mode in before:
            part.training = mode
