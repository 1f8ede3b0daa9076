"""`nn.Conv1d`, `2d`, `3d`, quantized and frozen; torch's own code honours every constructor argument.

`nn.ConvTranspose1d`, `2d`, `3d`, quantized and frozen; their output channel is (group, column of weight dim 1).

`nn.Linear`, quantized and frozen.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from daqconvert.functional.products import ConvolutionProducts, LinearProducts, PaddedProducts
from daqconvert.layers.base import QuantizedLayer
from daqconvert.layers.frozen import FrozenLayer
from daqconvert.layers.registry import register
from daqconvert.layers.site import Operation
from daqconvert.quantizers import ChannelLayout


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


class ConvTransposeOp:
    """The bare transposed convolution."""

    output_dims: int

    def accumulate(self: Any, x: Tensor, w: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Return the transposed convolution without bias; `output_size` as torch's forward takes it."""
        dims = self.output_dims
        padding = self._output_padding(
            x, output_size, self.stride, self.padding, self.kernel_size, dims, self.dilation
        )
        op = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dims - 1]
        return op(x, w, None, self.stride, self.padding, padding, self.groups, self.dilation)

    def products(self: Any, output_size: list[int] | None = None) -> Operation:
        """Return the same with its gradients."""
        if output_size is not None:
            return lambda x, w: self.accumulate(x, w, output_size)
        return ConvolutionProducts(self.stride, self.padding, self.dilation, self.groups, True, self.output_padding)

    def channel_layout(self: Any, shape: tuple[int, ...]) -> ChannelLayout:
        """Return where the output channels of a weight of this shape are."""
        return ChannelLayout.transposed(shape, self.groups)


class ConvTranspose1dOp(ConvTransposeOp):
    """1-D."""

    original = nn.ConvTranspose1d
    output_dims = 1


class ConvTranspose2dOp(ConvTransposeOp):
    """2-D."""

    original = nn.ConvTranspose2d
    output_dims = 2


class ConvTranspose3dOp(ConvTransposeOp):
    """3-D."""

    original = nn.ConvTranspose3d
    output_dims = 3


@register(nn.ConvTranspose1d)
class QuantConvTranspose1d(ConvTranspose1dOp, QuantizedLayer, nn.ConvTranspose1d):
    """Quantized `nn.ConvTranspose1d`."""


@register(nn.ConvTranspose2d)
class QuantConvTranspose2d(ConvTranspose2dOp, QuantizedLayer, nn.ConvTranspose2d):
    """Quantized `nn.ConvTranspose2d`."""


@register(nn.ConvTranspose3d)
class QuantConvTranspose3d(ConvTranspose3dOp, QuantizedLayer, nn.ConvTranspose3d):
    """Quantized `nn.ConvTranspose3d`."""


@register(nn.ConvTranspose1d)
class FrozenConvTranspose1d(ConvTranspose1dOp, FrozenLayer, nn.ConvTranspose1d):
    """Frozen `nn.ConvTranspose1d`."""


@register(nn.ConvTranspose2d)
class FrozenConvTranspose2d(ConvTranspose2dOp, FrozenLayer, nn.ConvTranspose2d):
    """Frozen `nn.ConvTranspose2d`."""


@register(nn.ConvTranspose3d)
class FrozenConvTranspose3d(ConvTranspose3dOp, FrozenLayer, nn.ConvTranspose3d):
    """Frozen `nn.ConvTranspose3d`."""


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
