"""Batch norm folded into the convolution before it: its module stays where it is and hands on what it gets."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

PLAIN: tuple[type[nn.Module], ...] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
CLIPPING: tuple[type[nn.Module], ...] = (nn.Identity, nn.ReLU, nn.ReLU6)
_CLASSES: dict[type[nn.Module], type[Any]] = {}


class FoldedBatchNorm(nn.Module):
    """Mixin of a batch norm whose numbers another layer holds: it computes what stands behind it, if anything."""

    original: type[nn.Module]

    def forward(self, x: Tensor) -> Tensor:
        """Return `act(x)`, or `x` where the class has no activation."""
        act = getattr(self, "act", None)
        if isinstance(act, nn.Module):
            x = act(self.drop(x))  # type: ignore[operator] # timm's has both
        return x

    def extra_repr(self) -> str:
        """Return that it is folded."""
        return "folded into the layer before"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _remake, (self.original,), self.__dict__


def folds(module: nn.Module) -> bool:
    """Whether a module is a batch norm that can be folded: of torch's own, or timm's with an activation behind.

    Args:
        module: Any.
    """
    normalizes = isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_var is not None
    return normalizes and (type(module) in PLAIN or _is_norm_act(type(module)))


def only_clips(activation: nn.Module) -> bool:
    """Whether the activation inside a batch norm only clips, which rounding does as well."""
    return type(activation) in CLIPPING


def _is_norm_act(cls: type[nn.Module]) -> bool:
    return cls.__name__ == "BatchNormAct2d" and cls.__module__.split(".")[0] == "timm"


def folded_numbers(norm: Any) -> tuple[Tensor, Tensor]:
    """Return `g, b` of `g * x + b`, which a batch norm computes in evaluation, in float64.

    Args:
        norm: A batch norm for which `folds` is true.
    """
    variance, mean = norm.running_var.double(), norm.running_mean.double()
    g = torch.rsqrt(variance + norm.eps)
    if norm.weight is not None:
        g = g * norm.weight.detach().double()
    b = -mean * g
    return g, b if norm.bias is None else b + norm.bias.detach().double()


def fold(norm: Any) -> None:
    """Make a batch norm hand on what it gets, in place; its numbers are forgotten."""
    original = type(norm)
    for name in ("weight", "bias"):
        norm.register_parameter(name, None)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        norm._buffers[name] = None
    norm.__class__ = _folded_class(original)


def _folded_class(original: type[nn.Module]) -> type[Any]:
    if original not in _CLASSES:
        body = {"original": original, "__module__": original.__module__}
        _CLASSES[original] = type(f"Folded{original.__name__}", (FoldedBatchNorm, original), body)
    return _CLASSES[original]


def _remake(original: type[nn.Module]) -> Any:
    """Unpickle: the derived class is made again."""
    cls: Any = _folded_class(original)
    return cls.__new__(cls)
