"""Frozen layers of integer deployment: their batch norm is folded in, their output rounded to the reader's grid.

The reader of a layer is the site whose input quantizer receives the layer's output: the next layer, or the output
quantizer of a module. Because the layer already rounds to the reader's grid, the reader computes the same codes again.
The batch norm between the two stays in the model as a `FoldedBatchNorm`, which returns its input unchanged (only its
activation, if it has one, still runs).
The arithmetic is that of `functional.integer`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from daqconvert.errors import ConversionError
from daqconvert.functional.grid import coding
from daqconvert.functional.integer import CodeGrid, IntegerLayer, agreeing_scale, integer_layer
from daqconvert.layers.frozen_site import FrozenSite
from daqconvert.spec import PlanRow


def make_integer(model: nn.Module, sites: dict[str, FrozenSite], row: PlanRow, empty: bool = False) -> None:
    """Make the frozen layer of a plan's row compute integers, in place, and fold its batch norm.

    `sites` maps names of plan rows to the model's frozen sites. If `empty`, the values are placeholders, to be loaded.

    Raises:
        ConversionError: If the batch norm or the reader that the row names is missing.
    """
    output, settings = row.site.output, row.settings
    assert output is not None and output.meets is not None and settings is not None
    site, reader = sites[row.name], sites.get(output.meets)
    norm = _batch_norm(model, row)
    if reader is None or reader.settings.a_bits is None:
        raise ConversionError(f"{row.name}: expected a quantized input {output.meets} to read it, found none.")
    if empty:
        site.hold_integer(_empty(site))
    else:
        scale, bias = _scale_and_bias(site)
        if norm is not None:
            g, b = folded_numbers(norm)
            scale, bias = scale * g, bias * g + b
        layer = integer_layer(
            scale, bias, round(-coding(settings.w_bits or 0, settings.grid)[1]), site.input_scale, reader.input_scale,
            reader.input_zero_point, reader.settings.a_bits, output.lower, output.upper,
        )  # fmt: skip
        site.hold_integer(layer)
    if norm is not None:
        fold(norm)


def fold_before_sum(model: nn.Module, site: FrozenSite, row: PlanRow, empty: bool = False) -> None:
    """Fold the batch norm of a frozen layer whose output enters a sum in float into its scale and bias, in place.

    The runtime adds within the layer's kernel, and nothing may stand between the two. If `empty`, the values are
    placeholders, to be loaded.

    Raises:
        ConversionError: If the batch norm that the row names is missing.
    """
    output = row.site.output
    if output is None or output.batch_norm is None:
        return
    norm = _batch_norm(model, row)
    scale, bias = _scale_and_bias(site)
    if not empty:
        g, b = folded_numbers(norm)
        scale, bias = scale * g, bias * g + b
    site.scale = scale.to(site.scale.dtype)
    site.register_parameter("bias", nn.Parameter(bias.to(site.dtype), requires_grad=False))
    fold(norm)


def _batch_norm(model: nn.Module, row: PlanRow) -> nn.Module | None:
    """Return the batch norm that a row's output goes through; None if there is none."""
    name = None if row.site.output is None else row.site.output.batch_norm
    norm = None if name is None else dict(model.named_modules()).get(name)
    if name is not None and (norm is None or not folds(norm)):
        raise ConversionError(f"{row.name}: expected a batch norm {name} to fold, found {type(norm).__name__}.")
    return norm


def _scale_and_bias(site: FrozenSite) -> tuple[Tensor, Tensor]:
    """Return the scale and the bias of every output channel in float64."""
    scale = site.scale.double().expand(site.weight_codes.shape[0])
    bias = getattr(site, "bias", None)
    return scale, torch.zeros_like(scale) if bias is None else bias.detach().double()


def _empty(site: FrozenSite) -> IntegerLayer:
    """Return zeros of the right shapes and dtypes, to be loaded."""
    like, channels = site.scale, site.weight_codes.shape[0]

    def zeros(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=like.device)

    scale, factor, bias = (zeros(dtype, channels) for dtype in (torch.float32, torch.int8, torch.int32))
    return IntegerLayer(scale, factor, bias, zeros(torch.float32), zeros(torch.uint8), zeros(torch.uint8, 2))


def settle_sums(sites: dict[str, FrozenSite], rows: dict[str, PlanRow], groups: dict[str, str]) -> None:
    """Adjust the scales of quantized sums of two values so that every runtime gives the same codes, in place.

    Sites that read such a sum on the same grid follow it, so that they find its codes again, and so do those that
    share its quantizer (`groups`, from `spec.input_groups`), whose sums are then looked at again. In one go no scale
    grows by more than a factor of `1 + 1e-4`. The keys of all arguments are names of plan rows. See
    `functional.integer.sums_agree`.
    """
    for _ in range(ROUNDS if groups else 1):
        if not _settle_once(sites, rows, groups):
            return


def _settle_once(sites: dict[str, FrozenSite], rows: dict[str, PlanRow], groups: dict[str, str]) -> bool:
    """Do `settle_sums` once for each sum; return whether a scale has changed."""
    changed = False
    places = {
        row.site.output.place: row for row in rows.values() if row.site.is_output and row.site.output is not None
    }
    for row in rows.values():
        output = row.site.output
        if not row.site.is_output or output is None or len(output.sources) != 2:
            continue
        first, second = (_grid_of(source, sites, rows, places) for source in output.sources)
        quantizer = sites.get(row.name)
        if quantizer is not None and first is not None and second is not None:
            before = _input_grid(quantizer)
            scale = agreeing_scale(first, second, before)
            changed |= scale != before.scale
            first_name = groups.get(row.name, row.name)
            partners = (name for name in sites if groups.get(name, name) == first_name)
            following = {name: sites[name] for name in (row.name, *output.readers, *partners) if name in sites}
            for site in [site for site in following.values() if _reads_on(site, before)]:
                _move_grid(site, scale)
    return changed


ROUNDS = 8
"""How often sums are settled where some of them share a grid: what suits one may not suit the other at first."""


def _reads_on(site: FrozenSite, grid: CodeGrid) -> bool:
    """Return whether a site quantizes its input to a grid, with any number of bits."""
    return site.settings.a_bits is not None and _input_grid(site) == grid


def _move_grid(site: FrozenSite, scale: float) -> None:
    """Set the scale of a site's input, and with it what its integer sums are worth."""
    if "scale" in site._buffers:  # an output quantizer has no sums
        site.scale.copy_(site.scale.double() * (scale / site.input_scale.double()))
    site.input_scale.fill_(scale)


def _grid_of(
    source: str, sites: dict[str, FrozenSite], rows: dict[str, PlanRow], places: dict[str | None, PlanRow]
) -> CodeGrid | None:
    """Return the grid of one term of a sum: the grid of the layer's reader, or of an earlier sum's quantizer."""
    row = rows.get(source)
    meets = row.site.output.meets if row is not None and row.site.output is not None else None
    name = meets if meets is not None else places[source].name if source in places else None
    return _input_grid(sites[name]) if name in sites else None


def _input_grid(site: FrozenSite) -> CodeGrid:
    return CodeGrid(site.input_scale.item(), int(site.input_zero_point))


FOLDABLE: tuple[type[nn.Module], ...] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
CLIPPING: tuple[type[nn.Module], ...] = (nn.Identity, nn.ReLU, nn.ReLU6)
_CLASSES: dict[type[nn.Module], type[Any]] = {}


class FoldedBatchNorm(nn.Module):
    """Mixin of a batch norm that is folded into the layer before it; only its activation, if any, still runs."""

    original: type[nn.Module]

    def forward(self, x: Tensor) -> Tensor:
        """Return `act(x)`, or `x` if the class has no activation."""
        act = getattr(self, "act", None)
        if isinstance(act, nn.Module):
            x = act(self.drop(x))  # type: ignore[operator] # timm's class has both
        return x

    def extra_repr(self) -> str:
        """Return a note that the batch norm is folded."""
        return "folded into the layer before"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _remake, (self.original,), self.__dict__


def folds(module: nn.Module) -> bool:
    """Whether a module is a batch norm that can be folded: one of torch's, or timm's with an activation behind it."""
    normalizes = isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_var is not None
    return normalizes and (type(module) in FOLDABLE or _is_norm_act(type(module)))


def only_clips(activation: nn.Module) -> bool:
    """Whether the activation inside a batch norm only clips, so that rounding to codes can replace it."""
    return type(activation) in CLIPPING


def _is_norm_act(cls: type[nn.Module]) -> bool:
    return cls.__name__ == "BatchNormAct2d" and cls.__module__.split(".")[0] == "timm"


def folded_numbers(norm: Any) -> tuple[Tensor, Tensor]:
    """Return `g` and `b` in float64: in evaluation mode, a batch norm that `folds` computes `g * x + b`."""
    variance, mean = norm.running_var.double(), norm.running_mean.double()
    g = torch.rsqrt(variance + norm.eps)
    if norm.weight is not None:
        g = g * norm.weight.detach().double()
    b = -mean * g
    return g, b if norm.bias is None else b + norm.bias.detach().double()


def fold(norm: Any) -> None:
    """Turn a batch norm into a `FoldedBatchNorm`, in place, and remove its parameters and statistics."""
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
    """Make the derived class again, for a batch norm that is being unpickled."""
    cls: Any = _folded_class(original)
    return cls.__new__(cls)
