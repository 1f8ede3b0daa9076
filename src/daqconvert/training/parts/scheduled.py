"""Freezing of bounds: from a share of the run on, bounds and output scales stay as they are, and the weights train on.

Nothing moves them, gradient, momentum and weight decay included: their optimizer rests.

Progressive bits: a run starts with more levels than the plan has, and steps down.

With stages `(until, w_bits, a_bits)` a site has `max(own bits, stage's bits)` for the first `floor(until * total)`
steps, operand by operand; float operands stay float. At every change of width the quantizers move their bounds to
where they are sensible for it (`set_bits`). The last step of a run always has the plan's bits.

While there are more bits than in the plan no epoch counts as the best one: its accuracy is another model's.

Sharpening: DAQ's slope is flat when a run begins and peaked when it ends.

    sigma(step) = own + (final - own) * floor(100 * (step - 1) / total) / 100

A flat slope lets everything move; a peaked one, whose gradient is largest half way between two levels, acts on what is
about to change its level. At one bit that lowered the training loss, at two it brought nothing
(`cifar10.py` in `benchmarks`), so operands of more bits than `final_sigma_bits` keep their own. Roundings other than
DAQ's have no such width, and nothing is done to them, so that a comparison changes the word `rounding` alone. A run
whose length nobody knows has no end to move to: it keeps its own as well.

Reference: "Distance-aware Quantization" (Kim, Lee, Ham, ICCV 2021), equations 6-11, for the slope; "Forward and
Backward Information Retention for Accurate Binary Neural Networks" (Qin et al., CVPR 2020), section 3.3, for a slope
that sharpens with time.

Early stopping: training ends when no epoch was better for a while.
"""

from __future__ import annotations

from typing import Any, ClassVar

from daqconvert.errors import TrainingError
from daqconvert.functional.grid import Rounding
from daqconvert.layers.site import QuantizedSite
from daqconvert.models import quantized_layers
from daqconvert.quantizers.base import Quantizer
from daqconvert.spec import Settings
from daqconvert.training.optim import QUANTIZERS
from daqconvert.training.recipes import Recipe
from daqconvert.training.run import Part, Run, steps_until
from daqconvert.training.rundir import Row


class FrozenBounds(Part):
    """Holds the quantizers' parameters still after the first `floor(freeze_bounds_at * total)` steps.

    Args:
        recipe: Gives `freeze_bounds_at`.
    """

    name: ClassVar[str] = "bounds"

    def __init__(self, recipe: Recipe) -> None:
        self.share = recipe.freeze_bounds_at

    def start(self, run: Run) -> None:
        """Find out when that is.

        Raises:
            TrainingError: If the length of the run is unknown.
        """
        self._last = steps_until(run, self.share, "freeze_bounds_at")

    def before_step(self, run: Run, number: int) -> None:
        """Let the optimizer of the quantizers rest when it is time."""
        if number > self._last:
            run.optimizers.resting.add(QUANTIZERS)


def make_bounds(recipe: Recipe) -> Part | None:
    """Return the part for a recipe with `freeze_bounds_at` below 1, else None."""
    return FrozenBounds(recipe) if recipe.freeze_bounds_at < 1.0 else None


Bits = tuple[int | None, int | None]


def set_site_bits(site: QuantizedSite, settings: Settings) -> None:
    """Give a site the widths that settings say, bounds and all; nothing is done where it has them.

    Args:
        site: Its quantizers are changed in place.
        settings: What it has from now on.
    """
    for quantizer, bits in ((site.weight_quantizer, settings.w_bits), (site.input_quantizer, settings.a_bits)):
        if quantizer is not None and bits is not None and quantizer.bits != bits:  # sites may share a quantizer
            quantizer.set_bits(bits)
    site.settings = settings


class ProgressiveBits(Part):
    """Steps down from more bits to the plan's.

    Args:
        recipe: Gives `progressive`.

    Attributes:
        stage: Index of the stage that the model is in; `len(stages)` is the plan.
    """

    name: ClassVar[str] = "progressive"

    def __init__(self, recipe: Recipe) -> None:
        self.stages = recipe.progressive
        self.stage = len(self.stages)

    def start(self, run: Run) -> None:
        """Note the plan's bits, and begin with the first stage.

        Raises:
            TrainingError: If the length of the run is unknown.
        """
        self._sites = quantized_layers(run.model)
        self._plan = {name: site.settings for name, site in self._sites.items()}
        self._ends = [steps_until(run, until, "progressive") for until, _, _ in self.stages]
        self._enter(self.stage_of(1))

    def stage_of(self, number: int) -> int:
        """Return the stage of an optimizer step, counted from 1."""
        return sum(number > end for end in self._ends)

    def before_step(self, run: Run, number: int) -> None:
        """Step down when it is time."""
        self._enter(self.stage_of(number))

    def after_epoch(self, run: Run, row: Row) -> None:
        """Forget the best epoch where it had more bits than the plan."""
        if self.stage < len(self.stages):
            run.best = None

    def close(self, run: Run) -> None:
        """Leave the plan's bits, whenever the run ended."""
        self._enter(len(self.stages))

    def meta(self) -> Any:
        """Return the stage."""
        return {"stage": self.stage}

    def load(self, tensors: Any, meta: Any) -> None:
        """Enter the stage of the run that is resumed; the model's bounds are loaded after that."""
        self._enter(meta["stage"])

    def _enter(self, stage: int) -> None:
        if stage == self.stage:
            return
        least: Bits = (None, None) if stage == len(self.stages) else self.stages[stage][1:]
        for name, site in self._sites.items():
            plan = self._plan[name]
            set_site_bits(site, plan.replace(w_bits=_more(plan.w_bits, least[0]), a_bits=_more(plan.a_bits, least[1])))
        self.stage = stage


def _more(own: int | None, least: int | None) -> int | None:
    return own if own is None or least is None else max(own, least)


def make_progressive(recipe: Recipe) -> Part | None:
    """Return the part for a recipe with `progressive`, else None."""
    return ProgressiveBits(recipe) if recipe.progressive else None


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


class Stopping(Part):
    """Stops a run after `patience` epochs that were not better than the best one on the validation loader.

    Args:
        recipe: Gives `patience`.
    """

    name: ClassVar[str] = "stopping"

    def __init__(self, recipe: Recipe) -> None:
        self.patience = recipe.patience

    def start(self, run: Run) -> None:
        """Check that there is something to be patient with.

        Raises:
            TrainingError: If there is no validation loader.
        """
        if run.val_loader is None:
            raise TrainingError("patience: needs a val_loader to tell which epoch is better. Pass one, or patience=0.")

    def after_epoch(self, run: Run, row: Row) -> None:
        """Say that the run stops, if it does."""
        since = 0 if run.best is None else row["epoch"] - run.best["epoch"]
        if since >= self.patience:
            run.stop = f"no epoch was better than epoch {row['epoch'] - since} for {since} epochs (patience)"


def make_stopping(recipe: Recipe) -> Part | None:
    """Return the part for a recipe with `patience`, else None."""
    return Stopping(recipe) if recipe.patience else None
