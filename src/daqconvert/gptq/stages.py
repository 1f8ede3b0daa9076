"""Which layers are chosen for, in the order in which a forward reaches them, and what their inputs are.

Layers of one block are one stage: their inputs are collected together, which costs one forward of each batch up to
there. It ends at the last layer that is asked for.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from daqconvert.batches import Enough, run_batch, run_batch_until
from daqconvert.gptq.columns import columns, has_columns, second_moments
from daqconvert.layers.base import QuantizedLayer
from daqconvert.layers.site import Operation, Watcher, watching
from daqconvert.models import quantized_layers
from daqconvert.quantizers import WeightQuantizer

MOST_INPUTS = 8192  # of one output: second moments are the square of it


@dataclass
class Seen:
    """What the first forward shows of a layer.

    Attributes:
        calls: Of one forward.
        why_not: Why nothing is chosen for it, or `""`.
    """

    calls: int = 0
    why_not: str = ""


class _First(Watcher):
    """Notes calls, in order, and what a layer cannot be chosen for."""

    def __init__(self, name: str, seen: dict[str, Seen]) -> None:
        self.name, self.seen = name, seen

    def before(self, site: Any, x: Tensor, weight: Tensor | None, operation: Operation) -> Tensor:
        """Note one call."""
        found = self.seen.setdefault(self.name, Seen())
        found.calls += 1
        found.why_not = found.why_not or _why_not(site, weight, operation)
        return x


def first_forward(model: nn.Module, batch: Any) -> dict[str, Seen]:
    """Return the layers that a forward reaches, in order, and which of them can be chosen for.

    Args:
        model: From `quantize`.
        batch: As `calibrate` takes it.
    """
    seen: dict[str, Seen] = {}
    sites = quantized_layers(model)
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
        return "the grid of its weight has no fixed step"
    if weight is None or id(weight) != id(site._parameters.get("weight")):
        return "its weight is computed from other parameters"
    if not has_columns(operation):
        return "it is neither linear nor a convolution of one or two dimensions, padded by numbers"
    if weight[0].numel() > MOST_INPUTS:
        return f"an output has more than {MOST_INPUTS} inputs"
    return ""


class _Inputs(Watcher):
    """Adds up second moments of layers' inputs, until a forward has shown all of them."""

    def __init__(self) -> None:
        self.found: dict[nn.Module, Tensor] = {}
        self.left = 0

    def before(self, site: Any, x: Tensor, weight: Tensor | None, operation: Operation) -> Tensor:
        """Add those of one call; end the forward where it was the last."""
        assert weight is not None
        quantizer = site.input_quantizer
        grid = x if quantizer is None else quantizer(x) * quantizer.scale()
        own = second_moments(columns(operation, grid, tuple(weight.shape)))
        self.found[site] = self.found[site] + own if site in self.found else own
        self.left -= 1
        if not self.left:
            raise Enough
        return x


def gather(model: nn.Module, batches: Iterable[Any], names: list[str], calls: int) -> dict[str, Tensor]:
    """Return the second moments of some layers' inputs as their quantizers give them, `X X^T`, shape `(G, K, K)`.

    Args:
        model: From `quantize`, in evaluation mode; these layers are switched off, the ones before them are not.
        batches: As `calibrate` takes them.
        names: Of the layers.
        calls: How often they are called in one forward, together.
    """
    inputs, sites = _Inputs(), quantized_layers(model)
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(watching(sites[name], inputs))
        for batch in batches:
            inputs.left = calls
            run_batch_until(model, batch)
    return {name: inputs.found[sites[name]] for name in names}
