"""Parts that follow a schedule: bits step down, roundings sharpen, bounds stand still from some step on.

A point of a run is given as a share of its steps: what lasts until `share` lasts for the first `floor(share * total)`
steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import nn

from daqconvert.errors import TrainingError
from daqconvert.functional.grid import Rounding
from daqconvert.layers.site import QuantizedSite
from daqconvert.models import quantized_sites
from daqconvert.quantizers.base import Quantizer
from daqconvert.spec import Settings
from daqconvert.training.optim import QUANTIZERS, Optimizers
from daqconvert.training.run import Part, Run
from daqconvert.training.rundir import Row

WIDTHS = 100  # kernel widths that a sharpening rounding goes through in a run


def steps_until(share: float, total: int, field: str) -> int:
    """Return how many optimizer steps a share of a run has; all of them at share 1.

    Args:
        share: From 0 to 1.
        total: Steps of the run; 0 where unknown.
        field: The field of the recipe that gives the share, for the message.

    Raises:
        TrainingError: If the length of the run is unknown.

    Example:
        >>> steps_until(0.3, 10, "freeze_bounds_at")
        3
    """
    if not total:
        raise TrainingError(
            f"{field}: is a share of the run, and train_loader has no length, so its steps are not known. Give the "
            f"loader a __len__, or leave {field} out."
        )
    return math.floor(share * total + 1e-9)  # 0.3 * 10 is 3 steps, whatever 0.3 is in binary


class ProgressiveBits(Part):
    """Starts a run with more levels than the plan has, and steps down to the plan's.

    In a stage `(until, w_bits, a_bits)`, which lasts until that share of the run, a site has `max(own bits, stage's
    bits)`, operand by operand; float operands stay float. When their bits change, the quantizers adapt their bounds
    (`set_bits`). The last step of a run always has the plan's bits. While a model has more bits than the plan, no
    epoch counts as the best one.

    Attributes:
        stage: Index of the stage that the model is in; `len(stages)` is the plan.
    """

    name: ClassVar[str] = "progressive"

    def __init__(self, run: Run, stages: Sequence[tuple[float, int | None, int | None]]) -> None:
        self.run, self.stages = run, stages
        self.stage = len(stages)

    def start(self) -> None:
        """Note the plan's bits, and begin with the first stage.

        Raises:
            TrainingError: If the length of the run is unknown.
        """
        self._sites = quantized_sites(self.run.model)
        self._plan = {name: site.settings for name, site in self._sites.items()}
        self._ends = [steps_until(until, self.run.total_steps, "progressive") for until, _, _ in self.stages]
        self._enter(self.stage_of(1))

    def before_step(self, number: int) -> None:
        """Step down when it is time."""
        self._enter(self.stage_of(number))

    def after_epoch(self, row: Row) -> None:
        """Forget the best epoch where it had more bits than the plan."""
        if self.stage < len(self.stages):
            self.run.best = None

    def close(self) -> None:
        """Give the model the plan's bits, wherever the run ended."""
        self._enter(len(self.stages))

    def meta(self) -> Any:
        """Return the stage."""
        return {"stage": self.stage}

    def load(self, tensors: Any, meta: Any) -> None:
        """Enter the stage in which the run was saved; the model's bounds are loaded after that."""
        self._enter(meta["stage"])

    def stage_of(self, number: int) -> int:
        """Return the stage of an optimizer step, counted from 1."""
        return sum(number > end for end in self._ends)

    def _enter(self, stage: int) -> None:
        if stage == self.stage:
            return
        w_least, a_least = (None, None) if stage == len(self.stages) else self.stages[stage][1:]
        for name, site in self._sites.items():
            plan = self._plan[name]
            set_site_bits(site, plan.replace(w_bits=_more(plan.w_bits, w_least), a_bits=_more(plan.a_bits, a_least)))
        self.stage = stage


def set_site_bits(site: QuantizedSite, settings: Settings) -> None:
    """Give a site other settings, in place; its quantizers take over the bits and adapt their bounds."""
    for quantizer, bits in ((site.weight_quantizer, settings.w_bits), (site.input_quantizer, settings.a_bits)):
        if quantizer is not None and bits is not None and quantizer.bits != bits:  # sites may share a quantizer
            quantizer.set_bits(bits)
    site.settings = settings


def _more(own: int | None, least: int | None) -> int | None:
    return own if own is None or least is None else max(own, least)


class Sharpening(Part):
    """Moves the kernel widths of DAQ's roundings from the model's own to final ones: flat at first, peaked at the end.

        sigma(step) = own + (final - own) * floor(100 * (step - 1) / total) / 100

    A flat slope moves all values alike; a peaked slope, whose gradient is largest half way between two levels, moves
    those that are about to change their level. At one bit sharpening lowered the training loss, at two it brought
    nothing (`cifar10.py` in `benchmarks`), so operands of more bits than `most_bits` keep their own width. Roundings
    other than DAQ's have no such width and stay as they are, so that a comparison of roundings need change nothing but
    `rounding`. In a run of unknown length all widths stay as well.

    Args:
        model: The model, with the bits of its plan when the part starts.
        total: Steps of the run; 0 where unknown.
        final: Kernel widths of weights and inputs at the end, 0 for the model's own.
        most_bits: Operands of at most this many bits are changed.

    Reference: "Distance-aware Quantization" (Kim, Lee, Ham, ICCV 2021), equations 6-11, for the slope; "Forward and
    Backward Information Retention for Accurate Binary Neural Networks" (Qin et al., CVPR 2020), section 3.3, for a
    slope that sharpens with time.
    """

    name: ClassVar[str] = "sharpening"

    def __init__(self, model: nn.Module, total: int, *, final: tuple[float, float], most_bits: int) -> None:
        self.model, self.total, self.final, self.most_bits = model, total, final, most_bits
        self._width = -1
        self._moving: dict[Quantizer, tuple[Rounding, float, float, float, bool]] = {}

    def start(self) -> None:
        """Note the roundings that will move."""
        for site in quantized_sites(self.model).values():
            s = site.settings
            if s.rounding != "daq" or not self.total:
                continue
            operands = (site.weight_quantizer, s.w_gamma, s.w_sigma), (site.input_quantizer, s.a_gamma, s.a_sigma)
            for (quantizer, gamma, sigma), final in zip(operands, self.final, strict=True):
                if quantizer is not None and final and quantizer.bits <= self.most_bits:
                    self._moving[quantizer] = quantizer.rounding, gamma, sigma, final, s.slope == "unit"

    def before_step(self, number: int) -> None:
        """Set this step's roundings."""
        if not self._moving:
            return
        width = WIDTHS * (number - 1) // self.total
        if width == self._width:
            return
        self._width = width
        for quantizer, (_, gamma, sigma, final, unit) in self._moving.items():
            quantizer.rounding = Rounding.make("daq", gamma, sigma + (final - sigma) * width / WIDTHS, unit)

    def close(self) -> None:
        """Give every quantizer its own rounding back, that of its settings."""
        for quantizer, (own, *_) in self._moving.items():
            quantizer.rounding = own


class FrozenBounds(Part):
    """Holds bounds and output scales still after a share of the run, while the weights train on.

    Their optimizer takes no more steps, so momentum and weight decay do not move them either.
    """

    name: ClassVar[str] = "bounds"

    def __init__(self, optimizers: Optimizers, total: int, share: float) -> None:
        self.optimizers, self.total, self.share = optimizers, total, share

    def start(self) -> None:
        """Compute the last step that trains the bounds.

        Raises:
            TrainingError: If the length of the run is unknown.
        """
        self._last = steps_until(self.share, self.total, "freeze_bounds_at")

    def before_step(self, number: int) -> None:
        """Let the optimizer of the quantizers rest when it is time."""
        if number > self._last:
            self.optimizers.resting.add(QUANTIZERS)
