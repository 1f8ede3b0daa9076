"""Sharpening: DAQ's slope is flat when a run begins and peaked when it ends.

    sigma(step) = own + (final - own) * floor(100 * (step - 1) / total) / 100

A flat slope lets everything move; a peaked one, whose gradient is largest half way between two levels, acts on what is
about to change its level. At one bit that lowered the training loss, at two it brought nothing
(`benchmarks/cifar10.py`), so operands of more bits than `final_sigma_bits` keep their own. Roundings other than DAQ's
have no such width, and nothing is done to them, so that a comparison changes the word `rounding` alone. A run whose
length nobody knows has no end to move to: it keeps its own as well.

Reference: "Distance-aware Quantization" (Kim, Lee, Ham, ICCV 2021), equations 6-11, for the slope; "Forward and
Backward Information Retention for Accurate Binary Neural Networks" (Qin et al., CVPR 2020), section 3.3, for a slope
that sharpens with time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from daqconvert.functional.grid import Rounding
from daqconvert.models import quantized_layers
from daqconvert.quantizers.base import Quantizer
from daqconvert.training.parts.base import Part
from daqconvert.training.recipes import Recipe

if TYPE_CHECKING:
    from daqconvert.training.engine import Run

STAGES = 100


class Sharpening(Part):
    """Moves the kernel widths of DAQ's roundings from the model's own to those of the recipe.

    Args:
        recipe: Gives `final_w_sigma` and `final_a_sigma`, of which at least one is positive, and `final_sigma_bits`.
    """

    name: ClassVar[str] = "sharpening"

    def __init__(self, recipe: Recipe) -> None:
        self._final = recipe.final_w_sigma, recipe.final_a_sigma
        self._most_bits = recipe.final_sigma_bits
        self._stage = -1
        self._moving: dict[Quantizer, tuple[Rounding, float, float, float, bool]] = {}

    def start(self, run: Run) -> None:
        """Note the roundings that will move; the model has the bits of its plan here."""
        for site in quantized_layers(run.model).values():
            s = site.settings
            if s.rounding != "daq" or not run.total_steps:
                continue
            operands = (site.weight_quantizer, s.w_gamma, s.w_sigma), (site.input_quantizer, s.a_gamma, s.a_sigma)
            for (quantizer, gamma, sigma), final in zip(operands, self._final, strict=True):
                if quantizer is not None and final and quantizer.bits <= self._most_bits:
                    self._moving[quantizer] = quantizer.rounding, gamma, sigma, final, s.slope == "unit"

    def before_step(self, run: Run, number: int) -> None:
        """Set this step's roundings."""
        if not self._moving:
            return
        stage = STAGES * (number - 1) // run.total_steps
        if stage == self._stage:
            return
        self._stage = stage
        for quantizer, (_, gamma, sigma, final, unit) in self._moving.items():
            quantizer.rounding = Rounding.make("daq", gamma, sigma + (final - sigma) * stage / STAGES, unit)

    def close(self, run: Run) -> None:
        """Give every quantizer its own rounding back: it is what its settings say."""
        for quantizer, (own, *_) in self._moving.items():
            quantizer.rounding = own


def make_sharpening(recipe: Recipe) -> Part | None:
    """Return the part for a recipe with a final kernel width, else None."""
    return Sharpening(recipe) if recipe.final_w_sigma or recipe.final_a_sigma else None
