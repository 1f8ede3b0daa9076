"""torch's convolutions, transposed convolutions and `nn.Linear`, quantized and frozen.

Each family is a mixin with the bare operation (`accumulate`; `products` is the same operation with known gradients)
and, for each torch class, two registered classes that inherit from the mixin and the torch class. These classes
honour every constructor argument, because they inherit torch's constructor, attributes and forward.
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
    """The bare convolution; `padding_mode` pads the integer-valued operand, where 0 is exactly zero."""

    def accumulate(self, x: Tensor, w: Tensor, *args: Any) -> Tensor:
        """Return the convolution of `x` with `w`, without bias."""
        return self._conv_forward(x, w, None)  # type: ignore[attr-defined]

    def products(self: Any, *args: Any) -> Operation:
        """Return the convolution as an operation whose gradients are known."""
        if isinstance(self.padding, str) and self.padding_mode == "zeros":
            return self.accumulate  # padding "same": torch decides on which side an odd padding is larger
        padding = self.padding if self.padding_mode == "zeros" else (0,) * self.output_dims
        known = ConvolutionProducts(self.stride, padding, self.dilation, self.groups)
        if self.padding_mode == "zeros":
            return known
        sides, mode = self._reversed_padding_repeated_twice, self.padding_mode
        return PaddedProducts(lambda x: F.pad(x, sides, mode=mode), known)


class Conv1dOp(ConvOp):
    """The bare 1-D convolution."""

    original = nn.Conv1d
    output_dims = 1


class Conv2dOp(ConvOp):
    """The bare 2-D convolution."""

    original = nn.Conv2d
    output_dims = 2


class Conv3dOp(ConvOp):
    """The bare 3-D convolution."""

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
    """The bare transposed convolution. Its output channels are pairs of a group and an index of weight dimension 1."""

    output_dims: int

    def accumulate(self: Any, x: Tensor, w: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Return the transposed convolution without bias; `output_size` means what it means in torch's forward."""
        dims = self.output_dims
        padding = self._output_padding(
            x, output_size, self.stride, self.padding, self.kernel_size, dims, self.dilation
        )
        op = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dims - 1]
        return op(x, w, None, self.stride, self.padding, padding, self.groups, self.dilation)

    def products(self: Any, output_size: list[int] | None = None) -> Operation:
        """Return the transposed convolution as an operation whose gradients are known."""
        if output_size is not None:
            return lambda x, w: self.accumulate(x, w, output_size)
        return ConvolutionProducts(self.stride, self.padding, self.dilation, self.groups, True, self.output_padding)

    def channel_layout(self: Any, shape: tuple[int, ...]) -> ChannelLayout:
        """Return which dimensions of a weight of this shape hold the output channels."""
        return ChannelLayout.transposed(shape, self.groups)


class ConvTranspose1dOp(ConvTransposeOp):
    """The bare 1-D transposed convolution."""

    original = nn.ConvTranspose1d
    output_dims = 1


class ConvTranspose2dOp(ConvTransposeOp):
    """The bare 2-D transposed convolution."""

    original = nn.ConvTranspose2d
    output_dims = 2


class ConvTranspose3dOp(ConvTransposeOp):
    """The bare 3-D transposed convolution."""

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
        """Return the product as an operation whose gradients are known."""
        return LinearProducts()


@register(nn.Linear)
class QuantLinear(LinearOp, QuantizedLayer, nn.Linear):
    """Quantized `nn.Linear`."""


@register(nn.Linear)
class FrozenLinear(LinearOp, FrozenLayer, nn.Linear):
    """Frozen `nn.Linear`."""
