"""An exponential moving average of the weights, evaluated and kept instead of them.

    average = decay * average + (1 - decay) * weights,   decay = ema, or with warm-up min(ema, 1 - step ** (-2/3))

after every optimizer step, counted from 1; the first one's weights begin it. Of all parameters and floating-point
buffers, each once however many names it has; flags, signs and counts are copied. Bounds and scales are averaged too,
so an averaged model is a quantized model like any other. Where the model changes its bits (`progressive`) the average
does so first.

Source: timm, `timm.utils.ModelEmaV3`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from daqconvert.modes import copy_model, quantized_layers
from daqconvert.training.parts.base import Part, Step
from daqconvert.training.parts.progressive import set_site_bits
from daqconvert.training.recipes import Recipe

if TYPE_CHECKING:
    from daqconvert.training.engine import Run

HALVES = (torch.float16, torch.bfloat16)  # too coarse for what one step adds: averaged in float32


class Average(Part):
    """The average, and its place in a run.

    Args:
        recipe: Gives `ema` and `ema_warmup`.
    """

    name: ClassVar[str] = "ema"

    def __init__(self, recipe: Recipe) -> None:
        self.decay, self.warmup = recipe.ema, recipe.ema_warmup
        self._model: nn.Module | None = None
        self._average: Any = None

    @property
    def module(self) -> nn.Module:
        """The averaged model; nobody calls it, it has the values."""
        found: nn.Module = self._average.module
        return found

    def start(self, run: Run) -> None:
        """Begin with the weights as they are."""
        from timm.utils import ModelEmaV3

        self._model = run.model
        halves = any(tensor.dtype in HALVES for tensor in run.model.parameters())
        self._average = ModelEmaV3(
            copy_model(run.model), decay=self.decay, use_warmup=self.warmup, dtype=torch.float32 if halves else None
        )

    @torch.no_grad()
    def after_step(self, run: Run, step: Step) -> None:
        """Take the weights of this step in."""
        self._follow()
        weight = 1.0 - self._average.get_decay(step.number)
        averaged, new = [], []
        for ours, theirs in _pairs(self.module, run.model):
            if not ours.is_floating_point():
                ours.copy_(theirs)
            else:
                averaged.append(ours)
                new.append(theirs.to(ours.dtype))
        torch._foreach_lerp_(averaged, new, weight=weight)

    @contextmanager
    def evaluating(self, run: Run) -> Iterator[None]:
        """Put the averaged values in the model's place, and its own back afterwards, bit for bit."""
        self._follow()
        pairs = _pairs(self.module, run.model)
        before = [theirs.clone() for _, theirs in pairs]
        try:
            self.finish(run)
            yield
        finally:
            with torch.no_grad():
                for (_, theirs), value in zip(pairs, before, strict=True):
                    theirs.copy_(value)

    @torch.no_grad()
    def finish(self, run: Run) -> None:
        """Leave the averaged values in the model."""
        self._follow()
        for ours, theirs in _pairs(self.module, run.model):
            theirs.copy_(ours)

    def tensors(self) -> dict[str, Tensor]:
        """Return the averaged model's state."""
        found: dict[str, Tensor] = self.module.state_dict()
        return found

    def load(self, tensors: dict[str, Tensor], meta: Any) -> None:
        """Take an averaged model's state; the model has its bits by then."""
        self._follow()
        self.module.load_state_dict(tensors)

    def _follow(self) -> None:
        """Give the average the bits that the model has, its bounds where they are sensible for them."""
        assert self._model is not None
        model = quantized_layers(self._model)
        for name, site in quantized_layers(self.module).items():
            if site.settings != model[name].settings:
                set_site_bits(site, model[name].settings)


def _pairs(average: nn.Module, model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """What the average has and what the model has of each tensor, each tensor of the model once."""
    ours, theirs = average.state_dict(keep_vars=True), model.state_dict(keep_vars=True)
    unique = {
        id(value): (ours[key].detach(), value.detach()) for key, value in theirs.items() if isinstance(value, Tensor)
    }
    return list(unique.values())


def make_average(recipe: Recipe) -> Part | None:
    """Return the part for a recipe with `ema`, else None."""
    return Average(recipe) if recipe.ema else None
