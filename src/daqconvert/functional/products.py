"""Bare products whose backward is known here: convolutions of all kinds, and `x W^T`.

Each is a callable `(x, w) -> sums`, as every operation of a site is, and knows besides where its output channels are
and how its gradients are computed, so that a site need not keep what autograd would keep.

They are made in a forward, so they have the hash of any object (`eq=False`): dynamo, up to torch 2.11, asks for it
before there are fields.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from daqconvert.functional.codes import View

_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


@dataclass(frozen=True, eq=False)
class LinearProducts:
    """`x W^T`, the channel of the output last.

    Example:
        >>> LinearProducts()(torch.ones(1, 2), torch.ones(3, 2)).tolist()
        [[2.0, 2.0, 2.0]]
    """

    output_dims = 0

    def __call__(self, x: Tensor, w: Tensor) -> Tensor:
        """Return the sums."""
        return F.linear(x, w)

    def accepts(self, x: Tensor, w: Tensor) -> bool:
        """Whether `gradients` can be asked for these operands."""
        return w.dim() == 2 and x.dim() > 1

    def view(self, shape: Sequence[int]) -> View:
        """Return a weight's shape as `(A, B, C, D)`, the channel being `a * C + c`."""
        return 1, 1, shape[0], shape[1]

    def gradients(
        self, grad: Tensor, x: Tensor | None, w: Tensor | None, shape: Sequence[int], needs: Sequence[bool]
    ) -> Gradients:
        """Return the gradients to `x`, `w` and a bias, each None where it is not needed.

        Args:
            grad: Of the output.
            x: Input; None where the gradient to `w` is not needed.
            w: Weight; None where the gradient to `x` is not needed.
            shape: Of the input.
            needs: Which of the three.
        """
        flat = grad.reshape(-1, grad.shape[-1])
        of_x = (flat @ w).reshape(shape) if needs[0] and w is not None else None
        of_w = flat.t() @ x.reshape(-1, shape[-1]) if needs[1] and x is not None else None
        return of_x, of_w, flat.sum(dim=0) if needs[2] else None


@dataclass(frozen=True, eq=False)
class ConvolutionProducts:
    """A convolution, or a transposed one, whose padding is zeros.

    Attributes:
        stride: One number per dimension, as all but the last two are.
        padding: Zeros on both sides.
        dilation: Between elements of the kernel.
        groups: Of channels.
        transposed: Whether it is a transposed convolution.
        output_padding: Of a transposed one.

    Example:
        >>> conv = ConvolutionProducts((1,), (1,), (1,), 1)
        >>> conv(torch.ones(1, 1, 3), torch.ones(1, 1, 3)).tolist()
        [[[2.0, 3.0, 2.0]]]
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    transposed: bool = False
    output_padding: tuple[int, ...] = ()

    @property
    def output_dims(self) -> int:
        """Number of dimensions after the channel."""
        return len(self.stride)

    def __call__(self, x: Tensor, w: Tensor) -> Tensor:
        """Return the sums."""
        dims = len(self.stride) - 1
        if self.transposed:
            return _TRANSPOSED[dims](
                x, w, None, self.stride, self.padding, self.output_padding, self.groups, self.dilation
            )
        return _CONVOLUTIONS[dims](x, w, None, self.stride, self.padding, self.dilation, self.groups)

    def accepts(self, x: Tensor, w: Tensor) -> bool:
        """Whether `gradients` can be asked for these operands: not without a batch dimension, nor for an empty one."""
        return x.dim() == len(self.stride) + 2 and x.numel() > 0

    def view(self, shape: Sequence[int]) -> View:
        """Return a weight's shape as `(A, B, C, D)`, the channel being `a * C + c`."""
        if self.transposed:
            return self.groups, shape[0] // self.groups, shape[1], math.prod(shape[2:])
        return 1, 1, shape[0], math.prod(shape[1:])

    def gradients(
        self, grad: Tensor, x: Tensor | None, w: Tensor | None, shape: Sequence[int], needs: Sequence[bool]
    ) -> Gradients:
        """Return the gradients to `x`, `w` and a bias, each None where it is not needed.

        Args:
            grad: Of the output.
            x: Input; None where the gradient to `w` is not needed.
            w: Weight; None where the gradient to `x` is not needed.
            shape: Of the input.
            needs: Which of the three.
        """
        assert w is not None  # torch looks at the shapes of both, whichever gradient is asked for
        given = grad.new_zeros(()).expand(shape) if x is None else x
        bias = [grad.shape[1]] if needs[2] else None
        of_x, of_w, of_bias = torch.ops.aten.convolution_backward.default(
            grad, given, w, bias, *self._geometry(), list(needs)
        )
        return of_x, of_w, of_bias

    def _geometry(self) -> tuple[list[int], list[int], list[int], bool, list[int], int]:
        output_padding = list(self.output_padding or (0,) * len(self.stride))
        return list(self.stride), list(self.padding), list(self.dilation), self.transposed, output_padding, self.groups


KNOWN = (LinearProducts, ConvolutionProducts)
KnownProducts = LinearProducts | ConvolutionProducts


@dataclass(frozen=True, eq=False)
class PaddedProducts:
    """Known products of an input that is padded first: its zeros stay zeros, or its own values are repeated.

    Attributes:
        pad: Pads the input.
        products: Of the padded input.
    """

    pad: Callable[[Tensor], Tensor]
    products: KnownProducts

    def __call__(self, x: Tensor, w: Tensor) -> Tensor:
        """Return the sums."""
        return self.products(self.pad(x), w)
