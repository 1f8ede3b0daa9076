"""Where the output channels of a weight are, for every kind of layer."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from daqconvert.functional.codes import View


@dataclass(frozen=True)
class ChannelLayout:
    """Where the output channels of a weight are: `weight.reshape(view)` against `bound.reshape(bound_view)`.

    For `Linear` and `Conv*` the channel is dim 0. For `ConvTranspose*`, `(C_in, C_out / groups, *kernel)`, it is
    (group, column of dim 1): `view = (groups, C_in / groups, C_out / groups, *kernel)`.
    """

    view: tuple[int, ...]
    bound_view: tuple[int, ...]
    channels: int

    @staticmethod
    def forward(shape: tuple[int, ...]) -> ChannelLayout:
        """Layout of a `Linear` or `Conv*` weight."""
        return ChannelLayout(shape, (shape[0],) + (1,) * (len(shape) - 1), shape[0])

    @staticmethod
    def transposed(shape: tuple[int, ...], groups: int) -> ChannelLayout:
        """Layout of a `ConvTranspose*` weight."""
        kernel = shape[2:]
        view = (groups, shape[0] // groups, shape[1], *kernel)
        return ChannelLayout(view, (groups, 1, shape[1]) + (1,) * len(kernel), groups * shape[1])

    @staticmethod
    def columns(shape: tuple[int, ...]) -> ChannelLayout:
        """Layout of a matrix that is multiplied from the right, `x @ W`: channels are its columns."""
        return ChannelLayout(shape, (1, shape[1]), shape[1])

    @property
    def memory_view(self) -> View:
        """The weight's shape as `(A, B, C, D)`, the channel being `a * C + c`, which the fused operator takes."""
        if len(self.bound_view) == 2 and self.bound_view[0] == 1 and self.view[1] == self.channels:
            return 1, self.view[0], self.view[1], 1
        if self.bound_view[0] == self.channels:
            return 1, 1, self.channels, math.prod(self.view[1:])
        return self.view[0], self.view[1], self.view[2], math.prod(self.view[3:])

    def rows(self, weight: Tensor) -> Tensor:
        """Return the weight as `(C_out, everything else)`."""
        if self.bound_view == (1, *self.view[1:]) and len(self.view) == 2:
            return weight.t()
        if self.view == tuple(weight.shape):
            return weight.reshape(self.channels, -1)
        return weight.reshape(self.view).transpose(1, 2).reshape(self.channels, -1)
