"""The products whose backward is written out here, convolutions and `x W^T`, and what follows them: `acc * S + b`.

Each kind of products is a callable `(x, w) -> sums`, as every operation of a site is. It also knows where its output
channels are and how to compute its gradients, so that a site need not keep what autograd would keep. `rescale` applies
scale and bias in plain torch, `rescale_` does so in place, with a kernel where possible.

Products are made in a forward, and dynamo up to torch 2.11 asks for their hash before their fields are set. So they
are hashed by identity (`eq=False`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from daqconvert.functional.codes import View
from daqconvert.functional.dasr import wide
from daqconvert.functional.native import address, kernels

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
        """Return the gradients to `x`, `w` and a bias from `grad`, that to the output.

        `needs` says which of the three are needed; the others are None. `shape` is that of the input. `x` may be None
        where no gradient to `w` is needed, and `w` where none to `x` is.
        """
        flat = grad.reshape(-1, grad.shape[-1])
        of_x = (flat @ w).reshape(shape) if needs[0] and w is not None else None
        of_w = flat.t() @ x.reshape(-1, shape[-1]) if needs[1] and x is not None else None
        return of_x, of_w, flat.sum(dim=0) if needs[2] else None


@dataclass(frozen=True, eq=False)
class ConvolutionProducts:
    """A convolution, or a transposed one, whose padding is zeros.

    Attributes:
        stride: One number per dimension, like padding, dilation and output padding.
        padding: Zeros on both sides.
        dilation: Distance between elements of the kernel.
        groups: Number of groups of channels.
        transposed: Whether it is a transposed convolution.
        output_padding: Rows that a transposed convolution adds on one side of its output.

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
        """Whether `gradients` can be asked for these operands: they need a batch dimension, and not an empty one."""
        return x.dim() == len(self.stride) + 2 and x.numel() > 0

    def view(self, shape: Sequence[int]) -> View:
        """Return a weight's shape as `(A, B, C, D)`, the channel being `a * C + c`."""
        if self.transposed:
            return self.groups, shape[0] // self.groups, shape[1], math.prod(shape[2:])
        return 1, 1, shape[0], math.prod(shape[1:])

    def gradients(
        self, grad: Tensor, x: Tensor | None, w: Tensor | None, shape: Sequence[int], needs: Sequence[bool]
    ) -> Gradients:
        """Return the gradients to `x`, `w` and a bias as in `LinearProducts`, except that `w` must be given."""
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
    """Known products of an input that is padded first, with zeros or with its own elements.

    Attributes:
        pad: Pads the input.
        products: Products of the padded input.
    """

    pad: Callable[[Tensor], Tensor]
    products: KnownProducts

    def __call__(self, x: Tensor, w: Tensor) -> Tensor:
        """Return the sums."""
        return self.products(self.pad(x), w)


def rescale(acc: Tensor, scale: Tensor, bias: Tensor | None, output_dims: int, in_place: bool = False) -> Tensor:
    """Return `acc * scale + bias`, computed in float32 at least, in the dtype of `acc`.

    `output_dims` dimensions follow the channel of `acc`. The scale is `()`, `(1,)` or `(C_out,)`, and so is a bias;
    where the channel is last it may be anything that broadcasts. With `in_place` the result takes the memory of `acc`,
    which nobody else may hold, and which has the dtype of scale and bias.

    Example:
        >>> rescale(torch.tensor([[1.0, 2.0]]), torch.tensor([2.0, 3.0]), torch.tensor([0.5, 0.5]), 0).tolist()
        [[2.5, 6.5]]
    """
    sums = wide(acc)
    per_channel = (-1, *(1,) * output_dims)
    scale = scale.reshape(per_channel) if scale.dim() and output_dims else scale
    y = sums.mul_(scale) if in_place else sums * scale
    if bias is not None:
        bias = bias if bias.dtype == y.dtype else bias.to(y.dtype)
        bias = bias.reshape(per_channel) if output_dims else bias
        y = y.add_(bias) if in_place else y + bias
    return y.to(acc.dtype)


def rescale_(acc: Tensor, scale: Tensor, bias: Tensor | None, output_dims: int) -> Tensor:
    """Compute `rescale` in the memory of `acc`, float32 or float64, and return it; one pass where the kernels can.

    Example:
        >>> rescale_(torch.tensor([[1.0, 2.0]]), torch.tensor([2.0, 3.0]), None, 0).tolist()
        [[2.0, 6.0]]
    """
    sizes = memory_sizes(acc, output_dims)
    library = None if sizes is None else kernels(acc, scale, bias)
    if sizes is None or library is None or not (bias is None or bias.is_contiguous()):
        return rescale(acc, scale, bias, output_dims, in_place=True)
    library.daq_rescale(
        acc.data_ptr(), acc.data_ptr(), *sizes, scale.data_ptr(), scale.numel() > 1, address(bias),
        torch.get_num_threads(),
    )  # fmt: skip
    return acc


def memory_sizes(acc: Tensor, output_dims: int) -> tuple[int, int, int] | None:
    """Return sums as `(outer, channels, inner)` in memory order, or None if their memory is laid out differently."""
    if acc.numel() == 0:
        return None
    channels = acc.shape[-1 - output_dims]
    inner = math.prod(acc.shape[acc.dim() - output_dims :])
    if acc.is_contiguous():
        return acc.numel() // (channels * inner), channels, inner
    last = torch.channels_last if output_dims == 2 else torch.channels_last_3d
    if output_dims in (2, 3) and acc.is_contiguous(memory_format=last):
        return acc.numel() // channels, channels, 1
    return None
