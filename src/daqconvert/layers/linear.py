"""`nn.Linear`, quantized and frozen."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from daqconvert.functional.products import LinearProducts
from daqconvert.layers.base import QuantizedLayer
from daqconvert.layers.frozen import FrozenLayer
from daqconvert.layers.registry import register


class LinearOp:
    """The bare product `x W^T`."""

    original = nn.Linear
    output_dims = 0

    def accumulate(self, x: Tensor, w: Tensor, *args: Any) -> Tensor:
        """Return `x W^T`."""
        return F.linear(x, w)

    def products(self, *args: Any) -> LinearProducts:
        """Return the same with its gradients."""
        return LinearProducts()


@register(nn.Linear)
class QuantLinear(LinearOp, QuantizedLayer, nn.Linear):
    """Quantized `nn.Linear`."""


@register(nn.Linear)
class FrozenLinear(LinearOp, FrozenLayer, nn.Linear):
    """Frozen `nn.Linear`."""
