"""Parts that watch a run, warn, and may end it: guard rails and early stopping.

Guard rails find what goes wrong at low bits; a warning gives a number and says what to try. After every epoch they
look for ranges that have collapsed, weights that all lie on one level, output scales that have fallen to nearly 0, and
layers that no gradient reaches. There is one warning per layer and kind in a run, and training goes on. After every
step they look at the loss: if it explodes, training stops.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from daqconvert.errors import TrainingError
from daqconvert.layers.site import QuantizedSite
from daqconvert.training.parts.measures import input_quantizers, input_range, level_counts, sites_of, weight_ranges
from daqconvert.training.recipes import Recipe
from daqconvert.training.run import Part, Run, Step
from daqconvert.training.rundir import Row, RunDirectory, kept

LOGGER = logging.getLogger("daqconvert.training")

COLLAPSED = 0.05  # of its start: a range below this has collapsed
DEAD = 1e-3  # of its start: an output scale below this is dead
ONE_LEVEL = 0.999  # share of the weights on one level
FEWEST = 16  # weights of a layer: if there are fewer, they may well share a level
LOOK = 8  # steps between two looks for a gradient
MOMENTUM, FIRST = 0.02, 10  # of the running mean of the loss; steps at the start that cannot be an explosion

Found = tuple[str, str]
"""The kind of a problem, and the warning's text without the layer's name."""


class Guards(Part):
    """Warns once per layer and kind (column `warnings`: how many are new), and stops where the loss explodes.

    Attributes:
        warnings: Dicts with `epoch`, `layer`, `kind`, `text`, of the whole run.
        levels: Weights on each level after the last epoch, by layer.

    Args:
        model: The model in training.
        recipe: Gives `explode`, and the values that the advice starts from.
        directory: Where checkpoints go, or None.
        tell: Whether to log the warnings, on this process.
    """

    name: ClassVar[str] = "guards"

    def __init__(self, model: nn.Module, recipe: Recipe, directory: RunDirectory | None, *, tell: bool) -> None:
        self.model, self.recipe, self.directory, self.tell = model, recipe, directory, tell
        self.warnings: list[dict[str, Any]] = []
        self.levels: dict[str, tuple[int, ...]] = {}
        self._sites: dict[str, QuantizedSite] = {}
        self._start: dict[str, Tensor] = {}
        self._reached: dict[str, Tensor] = {}  # whether a gradient was seen in this epoch
        self._loss = [0.0, 0.0, 0.0]  # weighted sum of losses, sum of their weights, mean of the first ones

    def start(self) -> None:
        """Note the ranges and scales that training starts from."""
        self._sites = sites_of(self.model)
        for name, site in self._sites.items():
            for what, quantizer in input_quantizers(site):
                low, high = input_range(quantizer)
                self._start[f"{what}/{name}"] = torch.tensor(high - low)
            ranges = weight_ranges(site)
            if ranges is not None:
                self._start[f"weight/{name}"] = ranges.cpu().clone()
            self._start[f"scale/{name}"] = site.output_scale.detach().float().abs().reshape(-1).cpu()

    def after_step(self, step: Step) -> None:
        """Stop where the loss explodes, and look for gradients.

        Raises:
            TrainingError: If the loss is `explode` times its running mean.
        """
        if step.number % LOOK == 0 or step.number == 1:
            self._look_for_gradients()
        if self.recipe.explode and math.isfinite(step.loss):
            self._watch_loss(step)

    def after_epoch(self, row: Row) -> None:
        """Look at every site, log what is new, and count it in the row."""
        told = {(warning["layer"], warning["kind"]) for warning in self.warnings}
        new = []
        counted = {name: level_counts(site) for name, site in self._sites.items()}
        self.levels = {name: counts for name, counts in counted.items() if counts is not None}
        for name, site in self._sites.items():
            for kind, text in self._problems(name, site):
                if (name, kind) not in told:
                    new.append({"epoch": row["epoch"], "layer": name, "kind": kind, "text": f"{name}: {text}"})
        self.warnings += new
        self._reached = {}
        row["warnings"] = len(new)
        if self.tell:
            for warning in new:
                LOGGER.warning("epoch %d: %s", warning["epoch"], warning["text"])

    def tensors(self) -> dict[str, Tensor]:
        """Return the ranges and scales that the run started from."""
        return self._start

    def meta(self) -> Any:
        """Return the warnings and the running mean."""
        reached = {name: bool(seen) for name, seen in self._reached.items()}
        return {"warnings": self.warnings, "loss": self._loss, "reached": reached}

    def load(self, tensors: dict[str, Tensor], meta: Any) -> None:
        """Go on with what `tensors` and `meta` returned."""
        self._start = {key: value.cpu().clone() for key, value in tensors.items()}
        self.warnings, self._loss = list(meta["warnings"]), list(meta["loss"])
        self._reached = {name: torch.tensor(seen) for name, seen in meta["reached"].items()}

    def _look_for_gradients(self) -> None:
        for name, site in self._sites.items():
            weight = site.float_weight()
            if weight is None or weight.grad_fn is not None or weight.grad is None:
                continue
            seen = self._reached.get(name)
            now = weight.grad.detach().any()
            self._reached[name] = now if seen is None else seen.to(now.device) | now

    def _watch_loss(self, step: Step) -> None:
        total, weight, first = self._loss
        mean = total / weight if weight else step.loss
        # a loss that has become small may jump by a large factor: only one above where the run began has exploded
        if step.number > FIRST and mean > 0 and step.loss > max(self.recipe.explode * mean, first):
            recipe = self.recipe
            raise TrainingError(
                f"epoch {step.epoch}, step {step.number}: the loss is {step.loss:.4g}, {step.loss / mean:.3g} times "
                f"its running mean {mean:.4g}: it explodes. Training stopped; {kept(self.directory)}. Start again "
                f"with lr={recipe.lr / 10:g} (now {recipe.lr:g}), quantizer_lr={recipe.quantizer_lr / 10:g} (now "
                f"{recipe.quantizer_lr:g}), clip_grad=1.0 or warmup_steps={max(100, step.total // 20)}; explode=0 "
                "never looks."
            )
        total, weight = (1 - MOMENTUM) * total + MOMENTUM * step.loss, (1 - MOMENTUM) * weight + MOMENTUM
        if step.number <= FIRST:
            first = total / weight
        self._loss = [total, weight, first]

    def _problems(self, name: str, site: QuantizedSite) -> Iterator[Found]:
        yield from self._collapsed_inputs(name, site)
        yield from self._collapsed_weights(name, site)
        yield from self._dead_scales(name, site)
        if name in self._reached and not bool(self._reached[name]):
            yield (
                "no gradient",
                "no gradient reached its weight in this epoch: all its inputs are clipped to 0, or those of a layer "
                "behind it. If you calibrated the model in evaluation mode, its bounds may not be those of training: "
                'call calibrate(model, batches, mode="both") first. Else try calibration_method="minmax", or more '
                "bits for its input.",
            )

    def _collapsed_inputs(self, name: str, site: QuantizedSite) -> Iterator[Found]:
        for what, quantizer in input_quantizers(site):
            low, high = input_range(quantizer)
            start, now = float(self._start[f"{what}/{name}"]), max(high, 0.0) - min(low, 0.0)
            if now <= 0.0:
                yield (
                    f"{what} range",
                    f"the bounds of its {what} have met ({low:.3g}, {high:.3g}): every value is clipped to 0. "
                    f"{self._slower()}",
                )
            elif now < COLLAPSED * start:
                yield (
                    f"{what} range",
                    f"the range of its {what} has shrunk to {100 * now / start:.2g} % of its start ({now:.3g} of "
                    f"{start:.3g}): nearly everything is clipped. {self._slower()}",
                )

    def _collapsed_weights(self, name: str, site: QuantizedSite) -> Iterator[Found]:
        ranges = weight_ranges(site)
        if ranges is not None:
            start, now = self._start[f"weight/{name}"], ranges.cpu()
            small = now < COLLAPSED * start
            if bool(small.any()):
                share = float((now / start.clamp(min=1e-12)).min())
                yield (
                    "weight range",
                    f"the range of its weights has shrunk to {100 * max(share, 0.0):.2g} % of its start"
                    f"{_channels(small)}. {self._slower()}",
                )
        counts = self.levels.get(name)
        if counts and sum(counts) >= FEWEST and max(counts) > ONE_LEVEL * sum(counts):
            level, bits = counts.index(max(counts)), site.weight_quantizer.bits if site.weight_quantizer else 0
            yield (
                "one level",
                f"{100 * max(counts) / sum(counts):.5g} % of its weights lie on level {level} of {len(counts)}: it "
                f"computes next to nothing. {self._slower()} Or give it more bits than {bits}: "
                f'bits={{"{name}": {min(8, bits + 2)}}}.',
            )

    def _dead_scales(self, name: str, site: QuantizedSite) -> Iterator[Found]:
        if not site.output_scale.requires_grad:
            return
        start, now = self._start[f"scale/{name}"], site.output_scale.detach().float().abs().reshape(-1).cpu()
        dead = now < DEAD * start
        if bool(dead.any()):
            advice = f"Try quantizer_lr={self.recipe.quantizer_lr / 10:g} (now {self.recipe.quantizer_lr:g})"
            if self.recipe.quantizer_weight_decay:
                advice += f" or quantizer_weight_decay=0 (now {self.recipe.quantizer_weight_decay:g})"
            fallen = f"{float(now.min()):.2g} (it began at {float(start.mean()):.3g} on average)"
            yield (
                "dead scale",
                f"its output_scale has fallen to {fallen}{_channels(dead)}: what it computes is lost. {advice}.",
            )

    def _slower(self) -> str:
        now = self.recipe.quantizer_lr
        return f"Try quantizer_lr={now / 10:g} (now {now:g}) or freeze_bounds_at=0.5."


def _channels(which: Tensor) -> str:
    return "" if which.numel() == 1 else f" in {int(which.sum())} of {which.numel()} channels"


class Stopping(Part):
    """Stops a run after `patience` epochs that were not better than the best one on the validation loader."""

    name: ClassVar[str] = "stopping"

    def __init__(self, run: Run, patience: int) -> None:
        self.run, self.patience = run, patience

    def start(self) -> None:
        """Check that epochs are evaluated.

        Raises:
            TrainingError: If there is no validation loader.
        """
        if self.run.val_epochs is None:
            raise TrainingError("patience: needs a val_loader to tell which epoch is better. Pass one, or patience=0.")

    def after_epoch(self, row: Row) -> None:
        """End the run when its patience is over."""
        best = self.run.best
        since = 0 if best is None else row["epoch"] - best["epoch"]
        if since >= self.patience:
            self.run.stop = f"no epoch was better than epoch {row['epoch'] - since} for {since} epochs (patience)"
