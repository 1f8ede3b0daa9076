"""What can be measured of a quantized site at one moment: its bounds, its scale, where its weights lie.

Everything is plain numbers, which can be compared, written as JSON, and drawn.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from daqconvert.layers.site import QuantizedSite
from daqconvert.models import quantized_sites
from daqconvert.quantizers import InputQuantizer, WeightQuantizer


@dataclass(frozen=True)
class Measure:
    """One site at one moment; values of a quantizer that it does not have are None.

    Attributes:
        bits: Bits of weight and input, as they are now.
        weight: Bounds `(lower, upper)` of the weight, the means over channels; in std where it is normalized.
        weight_spread: Least and largest upper bound of a channel of the weight.
        input: Bounds `(lower, upper)` of the input.
        scale: Least, mean and largest `|output_scale|`.
        levels: Number of weights on each level, lowest first.
    """

    bits: tuple[int | None, int | None]
    weight: tuple[float, float] | None
    weight_spread: tuple[float, float] | None
    input: tuple[float, float] | None
    scale: tuple[float, float, float]
    levels: tuple[int, ...] | None

    def plain(self) -> dict[str, Any]:
        """Return the measure as JSON gives it back, numbers with five significant digits, without the levels.

        Example:
            >>> Measure((2, 2), (-3.0, 3.0), (3.0, 3.0), None, (0.1234567, 0.5, 1.0), (1, 2, 2, 1)).plain()["scale"]
            [0.12346, 0.5, 1.0]
        """
        found = {key: value for key, value in asdict(self).items() if key != "levels"}
        return {key: None if value is None else [_short(number) for number in value] for key, value in found.items()}


def _short(value: float | None) -> float | None:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def sites_of(model: nn.Module) -> dict[str, QuantizedSite]:
    """Return the sites of a model that hold a weight or input quantizer, by dotted name; `(root)` for the model."""
    return {
        name or "(root)": site
        for name, site in quantized_sites(model).items()
        if isinstance(site, QuantizedSite) and (site.weight_quantizer is not None or site.input_quantizer is not None)
    }


def weight_ranges(site: QuantizedSite) -> Tensor | None:
    """Return `upper - lower` of the weight per channel; None if it is not quantized, or is another activation."""
    quantizer = site.weight_quantizer
    if not isinstance(quantizer, WeightQuantizer):
        return None
    upper = quantizer.upper.detach()
    lower = -upper if quantizer.own_lower is None else quantizer.own_lower.detach()
    return (upper - lower).float().reshape(-1)


def lowest_level(quantizer: WeightQuantizer) -> int:
    """Return how many levels lie below zero; 0 on the midrise grid, whose levels are counted from the lowest one."""
    if quantizer.grid == "midrise":
        return 0
    return quantizer.top + (1 if quantizer.grid == "twos" else 0)


def input_quantizers(site: QuantizedSite) -> Iterator[tuple[str, InputQuantizer]]:
    """Yield the quantizers of what depends on the data, the input and a second operand, each with its name."""
    if site.input_quantizer is not None:
        yield "input", site.input_quantizer
    if isinstance(site.weight_quantizer, InputQuantizer):
        yield "second operand", site.weight_quantizer


def input_range(quantizer: InputQuantizer) -> tuple[float, float]:
    """Return lower and upper bound of an input; the lower one is 0 where the input is known to be unsigned."""
    lower, upper = torch.cat([t.detach().float().reshape(1) for t in (quantizer.lower, quantizer.upper)]).tolist()
    return 0.0 if quantizer.sign is False else lower, upper


@torch.no_grad()
def level_counts(site: QuantizedSite) -> tuple[int, ...] | None:
    """Return how many weights lie on each level, lowest first; None where `weight_ranges` returns it."""
    quantizer, weight = site.weight_quantizer, site.float_weight()
    if not isinstance(quantizer, WeightQuantizer) or weight is None or not quantizer.ready:
        return None
    codes = quantizer.codes(weight.detach()).reshape(-1)
    levels = quantizer.top + lowest_level(quantizer) + 1
    return tuple(torch.bincount(codes.long(), minlength=levels).tolist())


@torch.no_grad()
def measure(site: QuantizedSite, *, levels: bool = True) -> Measure:
    """Measure one site; `levels=False` does not count the weights on each level, for which all are quantized."""
    quantizer, of_input = site.weight_quantizer, site.input_quantizer
    weight = spread = None
    if isinstance(quantizer, WeightQuantizer):
        upper = quantizer.upper.detach().float()
        lower = -upper if quantizer.own_lower is None else quantizer.own_lower.detach().float()
        found = torch.stack([lower.mean(), upper.mean(), upper.min(), upper.max()]).tolist()
        weight, spread = (found[0], found[1]), (found[2], found[3])
    scale = site.output_scale.detach().float().abs()
    least, mean, largest = torch.stack([scale.min(), scale.mean(), scale.max()]).tolist()
    return Measure(
        bits=(None if quantizer is None else quantizer.bits, None if of_input is None else of_input.bits),
        weight=weight,
        weight_spread=spread,
        input=None if of_input is None else input_range(of_input),
        scale=(least, mean, largest),
        levels=level_counts(site) if levels else None,
    )
