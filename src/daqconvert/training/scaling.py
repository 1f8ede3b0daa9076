"""Several optimizers as the one that torch's gradient scaler knows: one verdict for all, so all step or none does."""

from __future__ import annotations

from typing import Any, Protocol

from torch import nn


class Steps(Protocol):
    """What is needed of the optimizers here."""

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All trained parameters."""
        ...

    def step(self) -> None:
        """Update them."""
        ...


class ScaledOptimizers:
    """Optimizers as `torch.amp.GradScaler` takes one: with `param_groups` and `step`.

    Args:
        optimizers: What is stepped.

    Attributes:
        parameters: All trained parameters.
        param_groups: The same, as one group.
    """

    def __init__(self, optimizers: Steps) -> None:
        self._optimizers = optimizers
        self.parameters = optimizers.parameters
        self.param_groups: list[dict[str, Any]] = [{"params": self.parameters}]

    def step(self) -> None:
        """Update all parameters."""
        self._optimizers.step()
