"""Weights that jump between two levels: how many there are, and holding them still.

A weight oscillates when its code keeps changing back: it lies at the edge between two levels, and every step pushes it
over (`tracks` says how often). `"log"` looks at 4,096 weights a site, evenly spread; `"freeze"` follows all of them,
and holds those that oscillate at the level of their running average from then on.

Reference: "Overcoming Oscillations in Quantization-Aware Training" (Nagel, Fournarakis, Bondarenko, Blankevoort, ICML
2022), https://arxiv.org/abs/2203.11086.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from daqconvert.layers.site import QuantizedSite
from daqconvert.models import quantized_layers
from daqconvert.quantizers import WeightQuantizer
from daqconvert.training.parts.together import Together
from daqconvert.training.parts.tracks import SAMPLE, Track
from daqconvert.training.recipes import Recipe
from daqconvert.training.run import Part, Run, Step
from daqconvert.training.rundir import Row


class Oscillation(Part):
    """Logs the share of oscillating weights once an epoch (column `oscillating`), and freezes them where asked to.

    Attributes:
        tracks: By site.
        shares: By site, at the end of the last epoch: oscillating, and frozen.

    Args:
        freeze: Whether to freeze them; then there is a column `frozen`, too.
        threshold: Frequency from which a weight oscillates.
    """

    name: ClassVar[str] = "oscillation"

    def __init__(self, *, freeze: bool, threshold: float) -> None:
        self.freeze, self.threshold = freeze, threshold
        self.tracks: dict[str, Track] = {}
        self.shares: dict[str, tuple[float, float]] = {}
        self._together: list[Together] | None = None

    @staticmethod
    def wanted(recipe: Recipe) -> Oscillation | None:
        """Return the part that a recipe wants, or None.

        Args:
            recipe: How to train.
        """
        if recipe.oscillation == "off":
            return None
        return Oscillation(freeze=recipe.oscillation == "freeze", threshold=recipe.oscillation_threshold)

    def start(self, run: Run) -> None:
        """Take the codes before the first step."""
        self.tracks, self._together, seen = {}, None, set()
        for name, site in quantized_layers(run.model).items():
            if not isinstance(site, QuantizedSite) or not isinstance(site.weight_quantizer, WeightQuantizer):
                continue
            weight = site.float_weight()
            if weight is None or id(weight) in seen:  # a weight that two sites share is followed at the first
                continue
            seen.add(id(weight))
            # what is computed anew from other parameters cannot be set to a value: it is only looked at
            self.tracks[name] = Track(site, None if self.freeze and isinstance(weight, nn.Parameter) else SAMPLE)

    def before_step(self, run: Run, number: int) -> None:
        """Note the weights, so that frozen ones can be given back."""
        for track in self.tracks.values():
            track.hold()

    def after_step(self, run: Run, step: Step) -> None:
        """Take notice of the codes after a step."""
        if any(track.outdated for track in self.tracks.values()):
            self._together = None  # made anew after this step, that every track takes on its own
            for track in self.tracks.values():
                track.update(self.threshold)
            return
        if self._together is None:
            self._together = Together.of(self.tracks.values())
        for tracks in self._together:
            tracks.update()
        for track in self.tracks.values():
            if track.freezes:
                track.update(self.threshold)

    def after_epoch(self, run: Run, row: Row) -> None:
        """Add the share of oscillating weights to the row, and that of frozen ones where there may be some."""
        self.shares = {name: track.shares(self.threshold) for name, track in self.tracks.items()}
        count = sum(track.numel for track in self.tracks.values()) or 1
        totals = [sum(self.shares[name][i] * track.numel for name, track in self.tracks.items()) for i in (0, 1)]
        row["oscillating"] = totals[0] / count
        if self.freeze:
            row["frozen"] = totals[1] / count

    @contextmanager
    def evaluating(self, run: Run) -> Iterator[None]:
        """Put frozen weights at their level in what is evaluated, too: an average of weights has others there.

        Yields:
            Nothing.
        """
        before = [(track, track.weight().clone()) for track in self.tracks.values() if track.freezes]
        for track, _ in before:
            track.put()
        try:
            yield
        finally:
            for track, weight in before:
                track.weight().copy_(weight)

    def finish(self, run: Run) -> None:
        """Put frozen weights at their level in what training leaves behind."""
        for track in self.tracks.values():
            if track.freezes:
                track.put()

    def tensors(self) -> dict[str, Tensor]:
        """Return codes, directions, frequencies, and what is frozen, as `KEY/SITE`."""
        return {f"{key}/{name}": value.clone() for name, t in self.tracks.items() for key, value in t.state.items()}

    def meta(self) -> Any:
        """Return the bits for which that holds."""
        return {name: track.bits for name, track in self.tracks.items()}

    def load(self, tensors: dict[str, Tensor], meta: Any) -> None:
        """Go on with what `tensors` and `meta` returned."""
        self._together = None
        for name, track in self.tracks.items():
            track.bits = meta[name]
            for key, value in track.state.items():
                track.state[key] = torch.empty_like(value).copy_(tensors[f"{key}/{name}"])
