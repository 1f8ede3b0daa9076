"""What became of a part of a model that was fitted to its float twin before training."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fitted:
    """One layer or block; errors are `||y_q - y||^2 / ||y||^2` of its outputs over all batches.

    Attributes:
        name: Of the module.
        before: Error before it was fitted.
        after: Error after that.
        left_alone: Why it was not fitted, or `""`; it has no errors then.
    """

    name: str
    before: float = 0.0
    after: float = 0.0
    left_alone: str = ""
