"""Progressive bits: a run starts with more levels than the plan has, and steps down.

With stages `(until, w_bits, a_bits)` a site has `max(own bits, stage's bits)` for the first `floor(until * total)`
steps, operand by operand; float operands stay float. At every change of width the quantizers move their bounds to
where they are sensible for it (`set_bits`). The last step of a run always has the plan's bits.

While there are more bits than in the plan no epoch counts as the best one: its accuracy is another model's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from daqconvert.layers.site import QuantizedSite
from daqconvert.models import quantized_layers
from daqconvert.spec import Settings
from daqconvert.training.parts.base import Part
from daqconvert.training.parts.moments import steps_until
from daqconvert.training.recipes import Recipe

if TYPE_CHECKING:
    from daqconvert.training.engine import Run
    from daqconvert.training.logs import Row

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
