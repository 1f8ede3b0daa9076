"""GPTQ: weights get the codes that change a layer's output least, not the nearest ones.

Rounding to the nearest level minimizes the error of the weight. What matters is the error of the layer's output, where
the errors of many weights add up or cancel, because their inputs are correlated. For a weight `W` and inputs `X`, one
in each column, as they come from the quantized layers before and the layer's input quantizer,

    minimize  || Q X - W X ||^2   over weights Q on the grid

This needs only the second moments `X X^T` of a few hundred images: no labels, no gradients, no epochs.

`choose_codes` goes through a model in the order of a forward, so that the inputs of a layer come from layers whose
levels are already chosen. Layers of one block are treated together: one forward of each batch, which ends at the last
of these layers, collects the inputs of all. `columns` gives the columns `X` of one layer, `second_order_levels` solves
for its levels. In these two, tensors are `(G, ...)`: a grouped layer is `G` small problems, a layer without groups is
one.

Reference: "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (Frantar, Ashkboos,
Hoefler, Alistarh, ICLR 2023), https://arxiv.org/abs/2210.17323.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from daqconvert.batches import Enough, run_batch, run_batch_until
from daqconvert.functional.grid import quantize_weight
from daqconvert.functional.products import ConvolutionProducts, LinearProducts, PaddedProducts
from daqconvert.layers.base import QuantizedLayer
from daqconvert.layers.site import Operation, Watcher, watching
from daqconvert.models import disabled, evaluating, quantized_sites
from daqconvert.quantizers import WeightQuantizer
from daqconvert.report.fits import Fitted
from daqconvert.report.progress import progress

DAMPING = 0.01  # as in the reference
MOST_INPUTS = 8192  # of one output; second moments have the square of this many entries
MOST_POSITIONS = 256  # of one image; neighbours are nearly equal, and the time grows with the number
BLOCK = 128  # columns whose errors are passed on together: one product of large matrices instead of many small ones
TINY = 1e-10


@torch.no_grad()
def choose_codes(model: nn.Module, batches: list[Any], blocks: list[str], *, show: bool = True) -> list[Fitted]:
    """Set the weights of a quantized model, in place, to the levels that change its layers' outputs least.

    Some layers keep their nearest levels: those whose grid has no fixed scale (normalized weights, LSQ), transposed
    and 3-D convolutions, and those whose weight is shared, computed, or depends on the data.

    Args:
        model: A calibrated model from `quantize`.
        batches: Inputs as `calibrate` takes them; each block reads them once.
        blocks: Names of modules, as `block_names` gives them; the layers of one block are treated together, every
            other layer by itself.
        show: Whether to show progress.

    Returns:
        One entry for each layer with a quantized weight that a forward reaches, in that order. `before` is the error
        of the nearest levels; `left_alone` says why a layer keeps them.

    Example:
        >>> qmodel, x = dq.quantize(nn.Sequential(nn.Linear(8, 4)), w_bits=4, a_bits=8), torch.randn(64, 8)
        >>> _ = dq.calibrate(qmodel, [x])
        >>> (found,) = choose_codes(qmodel, [x], [])
        >>> found.name, found.after <= found.before
        ('0', True)
    """
    with evaluating(model), torch.compiler.set_stance("force_eager"):
        seen = _first_forward(model, batches[0])
        sites: dict[str, Any] = quantized_sites(model)
        todo = [name for name, found in seen.items() if not found.why_not]
        rows = {name: Fitted(name, left_alone=found.why_not) for name, found in seen.items()}
        with disabled(model), progress(len(todo), "GPTQ", enabled=show) as bar:
            for name in sites.keys() - todo:
                sites[name].enabled = True
            for _, group in groupby(todo, partial(_stage, blocks)):
                names = list(group)
                moments = _gather(model, batches, names, sum(seen[name].calls for name in names))
                for name in names:
                    rows[name] = _choose(sites[name], name, moments[name])
                    sites[name].enabled = True
                    bar.advance(layer=name)
    return [row for name, row in rows.items() if sites[name].weight_quantizer is not None]


def _choose(site: QuantizedLayer, name: str, moments: Tensor) -> Fitted:
    """Set a layer's weight to its GPTQ levels if they err less than the nearest; `moments` are those of its inputs."""
    quantizer = site.weight_quantizer
    assert isinstance(quantizer, WeightQuantizer)
    moments = moments.cpu() if moments.device.type == "mps" else moments  # MPS has no float64
    groups, inputs = moments.shape[:2]
    weight = site.weight.detach().to(moments.device, torch.float64).reshape(groups, -1, inputs)
    scale = torch.as_tensor(quantizer.scale()).to(moments.device, torch.float64)
    scale = scale.expand(len(site.weight)).reshape(groups, -1)
    nearest = partial(_nearest, quantizer=quantizer)
    plain = nearest(weight / scale[:, :, None])
    operand = second_order_levels(weight, moments, scale, nearest, DAMPING)
    errors = [output_error(found * scale[:, :, None], weight, moments) for found in (plain, operand)]
    if errors[1] < errors[0]:
        site.weight.copy_((operand * scale[:, :, None]).reshape(site.weight.shape))
        quantizer.note_fit(site.weight)  # chosen for these bounds
    return Fitted(name, errors[0], min(errors))


def _nearest(scaled: Tensor, quantizer: WeightQuantizer) -> Tensor:
    """Return the operand nearest to a weight that is given in units of its scale."""
    top = scaled.new_tensor(quantizer.top)
    return quantize_weight(scaled, -top, top, quantizer.bits, quantizer.grid, quantizer.plain_rounding())


def _stage(blocks: list[str], name: str) -> str:
    """Return the name of the block that a layer is in, or its own name if it is in none."""
    return next((block for block in blocks if name == block or name.startswith(f"{block}.")), name)


@dataclass
class _Seen:
    """What the first forward shows of a layer.

    Attributes:
        calls: How often one forward calls it.
        why_not: Why its levels cannot be chosen, or `""`.
    """

    calls: int = 0
    why_not: str = ""


class _First(Watcher):
    """Notes the calls of one layer, and why its levels cannot be chosen."""

    def __init__(self, name: str, seen: dict[str, _Seen]) -> None:
        self.name, self.seen = name, seen

    def before(self, site: Any, x: Tensor, weight: Tensor | None, operation: Operation) -> Tensor:
        """Note one call."""
        found = self.seen.setdefault(self.name, _Seen())
        found.calls += 1
        found.why_not = found.why_not or _why_not(site, weight, operation)
        return x


def _first_forward(model: nn.Module, batch: Any) -> dict[str, _Seen]:
    """Return the layers that a forward of one batch reaches, in that order."""
    seen: dict[str, _Seen] = {}
    sites = quantized_sites(model)
    with ExitStack() as stack:
        for name, site in sites.items():
            stack.enter_context(watching(site, _First(name, seen)))
        run_batch(model, batch)
    tensors = [id(site._parameters.get("weight")) for site in sites.values()]
    for name in seen:
        if tensors.count(id(sites[name]._parameters.get("weight"))) > 1:
            seen[name].why_not = seen[name].why_not or "shares its weight with another layer"
    return seen


def _why_not(site: Any, weight: Tensor | None, operation: Operation) -> str:
    quantizer = site.weight_quantizer
    if not isinstance(site, QuantizedLayer) or not isinstance(quantizer, WeightQuantizer):
        return "its weight depends on the data"
    if site.settings.rounding == "lsq" or site.unitless or quantizer.normalize:
        return "the grid of its weight has no fixed scale"
    if weight is None or id(weight) != id(site._parameters.get("weight")):
        return "its weight is computed from other parameters"
    if not weight.requires_grad:
        return "its weight is frozen: requires_grad is False"
    if not has_columns(operation):
        return "it is neither linear nor a convolution of one or two dimensions, padded by numbers"
    if weight[0].numel() > MOST_INPUTS:
        return f"an output has more than {MOST_INPUTS} inputs"
    return ""


class _Inputs(Watcher):
    """Adds up the second moments of layers' inputs; ends a forward when `left`, the number of calls to come, is 0."""

    def __init__(self) -> None:
        self.found: dict[nn.Module, Tensor] = {}
        self.left = 0

    def before(self, site: Any, x: Tensor, weight: Tensor | None, operation: Operation) -> Tensor:
        """Add the moments of one call; end the forward if that was the last call."""
        assert weight is not None
        quantizer = site.input_quantizer
        grid = x if quantizer is None else quantizer(x) * quantizer.scale()
        moments = second_moments(columns(operation, grid, tuple(weight.shape)))
        self.found[site] = self.found[site] + moments if site in self.found else moments
        self.left -= 1
        if not self.left:
            raise Enough
        return x


def _gather(model: nn.Module, batches: Iterable[Any], names: list[str], calls: int) -> dict[str, Tensor]:
    """Return `X X^T` of the layers `names`, shape `(G, K, K)`, with inputs as their quantizers give them.

    One forward calls these layers `calls` times, all together. They compute in float; the layers before them are
    quantized.
    """
    inputs, sites = _Inputs(), quantized_sites(model)
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(watching(sites[name], inputs))
        for batch in batches:
            inputs.left = calls
            run_batch_until(model, batch)
    return {name: inputs.found[sites[name]] for name in names}


def has_columns(operation: Operation) -> bool:
    """Return whether an operation is one that `columns` knows: linear, or a convolution of one or two dimensions."""
    if isinstance(operation, PaddedProducts):
        operation = operation.products
    if isinstance(operation, ConvolutionProducts):
        return not operation.transposed and len(operation.stride) <= 2
    return isinstance(operation, LinearProducts)


def columns(operation: Operation, x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the columns of an input `x` that a weight of this shape is multiplied with, at evenly spaced positions.

    Their shape is `(G, K, P)`: groups, inputs of an output, positions of all images. `has_columns` must be true of the
    operation.

    Example:
        >>> x = torch.arange(8.0).reshape(2, 4)
        >>> columns(LinearProducts(), x, (3, 4)).shape
        torch.Size([1, 4, 2])
    """
    if isinstance(operation, PaddedProducts):
        x, operation = operation.pad(x), operation.products
    if isinstance(operation, LinearProducts):
        flat = x.reshape(-1, x.shape[-1])
        per_image = max(1, flat.shape[0] // max(1, x.shape[0])) if x.dim() > 1 else 1
        return flat[:: max(1, per_image // MOST_POSITIONS)].t()[None]
    assert isinstance(operation, ConvolutionProducts)
    stride, padding, dilation = _pair(operation.stride, 1), _pair(operation.padding, 0), _pair(operation.dilation, 1)
    kernel = _pair(tuple(shape[2:]), 1)
    x = x if x.dim() == len(operation.stride) + 2 else x[None]
    x = x.unsqueeze(2) if len(operation.stride) == 1 else x
    outputs = 1
    for size, k, s, p, d in zip(x.shape[2:], kernel, stride, padding, dilation, strict=True):
        outputs *= max(1, (size + 2 * p - d * (k - 1) - 1) // s + 1)
    thin = max(1, math.ceil(math.sqrt(outputs / MOST_POSITIONS)))
    sparse = _pair(tuple(min(s * thin, max(s, n)) for s, n in zip(stride, x.shape[2:], strict=True)), 1)
    patches = F.unfold(x, kernel, dilation=dilation, padding=padding, stride=sparse)  # (N, C_in * kernel, L)
    groups = operation.groups
    n, rows, positions = patches.shape  # no size is left to torch, which cannot tell it of an empty batch
    inputs = rows // groups
    return patches.reshape(n, groups, inputs, positions).permute(1, 2, 0, 3).reshape(groups, inputs, n * positions)


def _pair(values: tuple[int, ...], fill: int) -> tuple[int, int]:
    """Return the values of a 1-D or 2-D convolution as those of a 2-D one; a missing first one is `fill`."""
    return (values[0], values[1]) if len(values) == 2 else (fill, values[0])


def second_moments(columns: Tensor) -> Tensor:
    """Return `X X^T` by group, in float32 or wider."""
    wide = columns.float() if columns.dtype in (torch.float16, torch.bfloat16) else columns
    return wide @ wide.mT


def second_order_levels(
    weight: Tensor, moments: Tensor, scale: Tensor, nearest: Callable[[Tensor], Tensor], damping: float
) -> Tensor:
    """Return operands `Q`, in float64, for which `(Q * scale) X` is close to `weight X`.

    Column after column is rounded, the one with the largest input first, and all columns that are not yet rounded make
    up for its error: `w_j -= (w_i - q_i) U_ij / U_ii`, where `U^T U = (X X^T + d I)^-1` (equation 3 of the reference;
    for its upper triangular form and blocks of columns see section 3, steps 2 and 3).

    Args:
        weight: Float weight, shape `(G, R, K)`.
        moments: Second moments of the inputs, `X X^T`, shape `(G, K, K)`.
        scale: Real units per integer of the operand, shape `(G, R)`.
        nearest: Function from weights in units of the scale, shape `(G, R)`, to the nearest operands on the grid.
        damping: `d` as a share of the mean of the diagonal of `X X^T`; with 0, the result would be arbitrary in
            directions that no input has.

    Example:
        >>> moments = torch.tensor([[[1.0, 0.9], [0.9, 1.0]]])
        >>> w = torch.tensor([[[0.4, 0.4]]])
        >>> second_order_levels(w, moments, torch.ones(1, 1), torch.round, damping=0.01).tolist()
        [[[0.0, 1.0]]]
    """
    weight, moments, scale = weight.double(), moments.double(), scale.double().clamp(min=TINY)
    order = moments.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
    places = order[:, None, :].expand_as(weight)
    left = weight.gather(2, places)
    moments = moments + _ridge(moments, damping)
    moments = moments.gather(1, order[:, :, None].expand_as(moments)).gather(2, order[:, None, :].expand_as(moments))
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(moments)), upper=True)
    found = torch.empty_like(left)
    for start in range(0, left.shape[2], BLOCK):
        stop = min(start + BLOCK, left.shape[2])
        errors = torch.empty_like(left[:, :, start:stop])
        for j in range(start, stop):
            column = left[:, :, j]
            found[:, :, j] = nearest(column / scale)
            error = (column - found[:, :, j] * scale) / upper[:, j, j, None]
            left[:, :, j + 1 : stop] -= error[:, :, None] * upper[:, j, None, j + 1 : stop]
            errors[:, :, j - start] = error
        left[:, :, stop:] -= errors @ upper[:, start:stop, stop:]
    return torch.empty_like(found).scatter_(2, places, found)


def output_error(levels: Tensor, weight: Tensor, moments: Tensor) -> float:
    """Return `|| (levels - weight) X ||^2 / || weight X ||^2` from `moments = X X^T`; 0 where `weight X` is 0."""
    moments = moments.double()
    whole = _power(weight.double(), moments)
    return _power(levels.double() - weight.double(), moments) / whole if whole > 0 else 0.0


def _power(weight: Tensor, moments: Tensor) -> float:
    return float(((weight @ moments) * weight).sum())


def _ridge(moments: Tensor, damping: float) -> Tensor:
    mean = moments.diagonal(dim1=1, dim2=2).mean(dim=1).clamp(min=TINY)  # inputs that are all 0 can be solved too
    return damping * mean[:, None, None] * torch.eye(moments.shape[1], dtype=moments.dtype, device=moments.device)
