"""A frozen layer in integer deployment: batch norm folded in, output rounded to the grid of whoever reads it.

Batch norm folded into the convolution before it: its module stays where it is and hands on what it gets.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from daqconvert.errors import ConversionError
from daqconvert.functional.grid import coding
from daqconvert.functional.integer import CodeGrid, IntegerLayer, agreeing_scale, integer_layer
from daqconvert.layers.frozen_site import INTEGER_BUFFERS, FrozenSite
from daqconvert.spec import PlanRow


def is_integer(site: nn.Module) -> bool:
    """Whether a frozen site rounds its output to integers."""
    return isinstance(site, FrozenSite) and "w_factor" in site._buffers


def make_integer(model: nn.Module, sites: dict[str, FrozenSite], row: PlanRow, empty: bool = False) -> None:
    """Give a frozen layer the numbers of integer deployment, in place, and fold its batch norm.

    Args:
        model: The frozen model.
        sites: Its sites by the names that plans know them by.
        row: Of the layer, with `site.output.meets`.
        empty: Make places for values that are to be loaded.

    Raises:
        ConversionError: If the batch norm, or the quantizer that it meets, is not there.
    """
    output, settings = row.site.output, row.settings
    assert output is not None and output.meets is not None and settings is not None
    site, target = sites[row.name], sites.get(output.meets)
    norm = None if output.batch_norm is None else dict(model.named_modules()).get(output.batch_norm)
    if target is None or target.settings.a_bits is None:
        raise ConversionError(f"{row.name}: expected a quantized input {output.meets} to read it, found none.")
    if output.batch_norm is not None and (norm is None or not folds(norm)):
        raise ConversionError(
            f"{row.name}: expected a batch norm {output.batch_norm} to fold, found {type(norm).__name__}."
        )
    if empty:
        _hold(site, _empty(site))
        if norm is not None:
            fold(norm)
        return
    channels = site.weight_codes.shape[0]
    scale = site.scale.double().expand(channels) if site.scale.dim() == 0 else site.scale.double()
    bias = _bias(site, scale)
    if norm is not None:
        g, b = folded_numbers(norm)
        scale, bias = scale * g, bias * g + b
        fold(norm)
    numbers = integer_layer(
        scale, bias, round(-coding(settings.w_bits or 0, settings.grid)[1]), site.input_scale, target.input_scale,
        target.input_zero_point, target.settings.a_bits, output.lower, output.upper,
    )  # fmt: skip
    _hold(site, numbers)


def settle_sums(sites: dict[str, FrozenSite], rows: dict[str, PlanRow]) -> None:
    """Move the scales of sums to where every runtime's arithmetic gives the same codes, by 1e-4 at most, in place.

    Args:
        sites: Frozen, by the names that plans know them by.
        rows: Of the plan, by name.
    """
    places = {
        row.site.output.place: row for row in rows.values() if row.site.is_output and row.site.output is not None
    }
    for row in rows.values():
        output = row.site.output
        if not row.site.is_output or output is None or len(output.sources) != 2:
            continue
        grids = [_grid_of(source, sites, rows, places) for source in output.sources]
        target = sites.get(row.name)
        if target is not None and grids[0] is not None and grids[1] is not None:
            scale = agreeing_scale(grids[0], grids[1], _codes(target))
            target.input_scale.fill_(scale)


def _grid_of(
    source: str, sites: dict[str, FrozenSite], rows: dict[str, PlanRow], places: dict[str | None, PlanRow]
) -> CodeGrid | None:
    """The grid that an addend lies on: a layer's output, or an earlier sum."""
    row = rows.get(source)
    meets = row.site.output.meets if row is not None and row.site.output is not None else None
    name = meets if meets is not None else places[source].name if source in places else None
    return _codes(sites[name]) if name in sites else None


def _codes(site: FrozenSite) -> CodeGrid:
    return CodeGrid(site.input_scale.item(), int(site.input_zero_point))


def _hold(site: FrozenSite, numbers: IntegerLayer) -> None:
    del site._buffers["scale"]
    for key, value in zip(INTEGER_BUFFERS, numbers, strict=True):
        site.register_buffer(key, value)
    if "bias" in site._parameters:
        site.register_parameter("bias", None)


def _empty(site: FrozenSite) -> IntegerLayer:
    """Numbers of the right shapes."""
    like, channels = site.scale, site.weight_codes.shape[0]

    def zeros(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=like.device)

    scale, factor, bias = (zeros(dtype, channels) for dtype in (torch.float32, torch.int8, torch.int32))
    return IntegerLayer(scale, factor, bias, zeros(torch.float32), zeros(torch.uint8), zeros(torch.uint8, 2))


def _bias(site: FrozenSite, like: Tensor) -> Tensor:
    bias = getattr(site, "bias", None)
    return torch.zeros_like(like) if bias is None else bias.detach().double()


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
