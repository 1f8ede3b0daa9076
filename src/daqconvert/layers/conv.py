"""`nn.Conv1d`, `2d`, `3d`, quantized and frozen; torch's own code honours every constructor argument."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from daqconvert.functional.products import ConvolutionProducts, PaddedProducts
from daqconvert.layers.base import QuantizedLayer
from daqconvert.layers.frozen import FrozenLayer
from daqconvert.layers.registry import register
from daqconvert.layers.site import Operation


class ConvOp:
    """The bare convolution; `padding_mode` pads the integer operands, whose zero is exact."""

    def accumulate(self, x: Tensor, w: Tensor, *args: Any) -> Tensor:
        """Return the convolution of `x` with `w`, without bias."""
        return self._conv_forward(x, w, None)  # type: ignore[attr-defined]

    def products(self: Any, *args: Any) -> Operation:
        """Return the same with its gradients."""
        if isinstance(self.padding, str) and self.padding_mode == "zeros":
            return self.accumulate  # torch decides where an odd padding goes
        padding = self.padding if self.padding_mode == "zeros" else (0,) * self.output_dims
        known = ConvolutionProducts(self.stride, padding, self.dilation, self.groups)
        if self.padding_mode == "zeros":
            return known
        sides, mode = self._reversed_padding_repeated_twice, self.padding_mode
        return PaddedProducts(lambda x: F.pad(x, sides, mode=mode), known)


class Conv1dOp(ConvOp):
    """1-D."""

    original = nn.Conv1d
    output_dims = 1


class Conv2dOp(ConvOp):
    """2-D."""

    original = nn.Conv2d
    output_dims = 2


class Conv3dOp(ConvOp):
    """3-D."""

    original = nn.Conv3d
    output_dims = 3


@register(nn.Conv1d)
class QuantConv1d(Conv1dOp, QuantizedLayer, nn.Conv1d):
    """Quantized `nn.Conv1d`."""


@register(nn.Conv2d)
class QuantConv2d(Conv2dOp, QuantizedLayer, nn.Conv2d):
    """Quantized `nn.Conv2d`."""


@register(nn.Conv3d)
class QuantConv3d(Conv3dOp, QuantizedLayer, nn.Conv3d):
    """Quantized `nn.Conv3d`."""


@register(nn.Conv1d)
class FrozenConv1d(Conv1dOp, FrozenLayer, nn.Conv1d):
    """Frozen `nn.Conv1d`."""


@register(nn.Conv2d)
class FrozenConv2d(Conv2dOp, FrozenLayer, nn.Conv2d):
    """Frozen `nn.Conv2d`."""


@register(nn.Conv3d)
class FrozenConv3d(Conv3dOp, FrozenLayer, nn.Conv3d):
    """Frozen `nn.Conv3d`."""
