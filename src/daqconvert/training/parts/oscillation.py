"""Weights that jump between two levels: how many there are, and holding them still.

A weight oscillates when its code keeps changing back: it lies at the edge between two levels, and every step pushes it
over. With `o_t = 1` where the code changes at step t in the direction opposite to its last change, else 0:

    frequency   f_t = m * o_t + (1 - m) * f_{t-1},   m = 0.01
    average     a_t = m * code_t + (1 - m) * a_{t-1}

A weight oscillates where `f` is above a threshold. `"log"` follows 4,096 weights of a site, evenly spread; `"freeze"`
follows all of them, and a weight that oscillates has the code `round(a)` of that moment from then on.

Reference: "Overcoming Oscillations in Quantization-Aware Training" (Nagel, Fournarakis, Bondarenko, Blankevoort, ICML
2022), https://arxiv.org/abs/2203.11086.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate, pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from daqconvert.functional.grid import TINY
from daqconvert.layers.site import QuantizedSite
from daqconvert.models import quantized_sites
from daqconvert.quantizers import WeightQuantizer
from daqconvert.training.parts.measures import lowest_level
from daqconvert.training.run import Part, Step
from daqconvert.training.rundir import Row

MOMENTUM = 0.01
SAMPLE = 4096  # weights of a site that are followed where nothing is frozen
MARGIN = 0.1  # in std: how far from the edge of its level a frozen weight must lie if weights are normalized ...
MIDDLE = 0.25  # ... but a weight that is within this part of a level from the middle is always far enough


class Oscillation(Part):
    """Logs the share of oscillating weights once an epoch (column `oscillating`), and freezes them where asked to.

    Attributes:
        trackers: What follows the weight of each site, by the site's name; several sites may share one.
        shares: Shares of the weights that oscillate and that are frozen, by site, at the end of the last epoch.

    Args:
        model: The model in training.
        freeze: Whether to freeze oscillating weights; then there is a column `frozen`, too.
        threshold: Frequency above which a weight oscillates.
    """

    name: ClassVar[str] = "oscillation"

    def __init__(self, model: nn.Module, *, freeze: bool, threshold: float) -> None:
        self.model, self.freeze, self.threshold = model, freeze, threshold
        self.trackers: dict[str, Tracker] = {}
        self.shares: dict[str, tuple[float, float]] = {}

    def start(self) -> None:
        """Note the codes before the first step."""
        self.trackers = trackers_of(self.model, freeze=self.freeze)

    def before_step(self, number: int) -> None:
        """Note the weights, so that frozen ones can be restored after the step."""
        for tracker in self._each(freezing=True):
            tracker.hold()

    def after_step(self, step: Step) -> None:
        """Follow the codes over a step."""
        for tracker in self._each():
            tracker.update(self.threshold)

    def after_epoch(self, row: Row) -> None:
        """Add the share of oscillating weights to the row, and that of frozen ones where there may be some."""
        self.shares = {name: tracker.shares(name, self.threshold) for name, tracker in self.trackers.items()}
        sizes = {name: tracker.numel[name] for name, tracker in self.trackers.items()}
        oscillating, frozen = (sum(self.shares[name][i] * size for name, size in sizes.items()) for i in (0, 1))
        count = sum(sizes.values()) or 1
        row["oscillating"] = oscillating / count
        if self.freeze:
            row["frozen"] = frozen / count

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Put frozen weights at their level in the evaluated model too: averaged weights may lie elsewhere.

        Yields:
            Nothing.
        """
        before = [(w, w.clone()) for tracker in self._each(freezing=True) for w in tracker.weights()]
        self.finish()
        try:
            yield
        finally:
            for weight, value in before:
                weight.copy_(value)

    def finish(self) -> None:
        """Put frozen weights at their level in the trained model."""
        for tracker in self._each(freezing=True):
            tracker.put()

    def tensors(self) -> dict[str, Tensor]:
        """Return the state of every site's weights, as `KEY/SITE`."""
        return {
            f"{key}/{name}": value.clone()
            for name, tracker in self.trackers.items()
            for key, value in tracker.state_of(name).items()
        }

    def meta(self) -> Any:
        """Return the bits for which the state holds, by site."""
        return {name: tracker.bits[name] for name, tracker in self.trackers.items()}

    def load(self, tensors: dict[str, Tensor], meta: Any) -> None:
        """Go on with what `tensors` and `meta` returned."""
        for tracker in self._each():
            tracker.load(tensors, meta)

    def _each(self, *, freezing: bool = False) -> list[Tracker]:
        """Return every tracker once, or those that freeze weights."""
        return [tracker for tracker in dict.fromkeys(self.trackers.values()) if tracker.freezes or not freezing]


def trackers_of(model: nn.Module, *, freeze: bool) -> dict[str, Tracker]:
    """Return the tracker of each site's weight, by the site's name; of sites that share a weight the first has one.

    Samples of many sites are followed together, by one tracker. A weight that may be frozen is followed whole, by a
    tracker of its own. A weight that is computed from other parameters cannot be set to a value and is never frozen,
    nor is one that is not trained: it stays what it is.
    """
    groups: dict[Any, dict[str, QuantizedSite]] = {}
    seen: set[int] = set()
    keys = {}
    for name, site in quantized_sites(model).items():
        if not isinstance(site, QuantizedSite) or not isinstance(site.weight_quantizer, WeightQuantizer):
            continue
        weight = site.float_weight()
        if weight is None or id(weight) in seen:
            continue
        seen.add(id(weight))
        alone = freeze and isinstance(weight, nn.Parameter) and weight.requires_grad
        keys[name] = name if alone else (weight.device, weight.dtype, site.weight_quantizer.normalize)
        groups.setdefault(keys[name], {})[name] = site
    trackers = {key: Tracker(sites, None if isinstance(key, str) else SAMPLE) for key, sites in groups.items()}
    return {name: trackers[key] for name, key in keys.items()}


class Tracker:
    """Follows the codes of some sites' weights over the steps, and holds those that are frozen.

    The followed weights of all its sites are in one tensor `(N,)`, so that a step costs a few operations in all and
    not some twenty for each site. Grids have one element for each bound, `(B,)`:

        W = (code - offset) * scale + origin

    Args:
        sites: Sites by name; their weights have one device and one dtype, and all of them are normalized or none is.
        most: How many weights of a site to follow, evenly spread; None for all, which then may be frozen.

    Attributes:
        freezes: Whether weights may be frozen.
        numel: Number of weights of each site, followed or not.
        bits: Bits for which the state holds, by site; when its quantizer has other bits, a site starts anew.
        state: Tensors `(N,)`: `code` (uint8), `direction` (int8, of the last change), `frequency`; where weights may
            be frozen also `average` and `frozen` (bool).
    """

    def __init__(self, sites: Mapping[str, QuantizedSite], most: int | None = SAMPLE) -> None:
        self.sites, self.freezes = sites, most is None
        self._quantizers = [_quantizer(site) for site in sites.values()]
        self._normalized = self._quantizers[0].normalize
        self.numel = {name: weight.numel() for name, weight in zip(sites, self.weights(), strict=True)}
        self._strides = [1 if most is None else math.ceil(numel / most) for numel in self.numel.values()]
        self._sizes = [-(-numel // stride) for numel, stride in zip(self.numel.values(), self._strides, strict=True)]
        ends = accumulate(self._sizes, initial=0)
        self._where = {name: slice(*ends) for name, ends in zip(sites, pairwise(ends), strict=True)}
        self._counts = [quantizer.upper.numel() for quantizer in self._quantizers]
        self._which = self._bound_of_each()
        self._sign = self._spread([-1 if q.grid == "midrise" else 0 for q in self._quantizers], self._counts)
        self._held: list[Tensor] | None = None
        self._read_bits()
        self.state = self._fresh()

    def weights(self) -> list[Tensor]:
        """Return the float weights of the sites, without a graph."""
        return [_weight(site).detach() for site in self.sites.values()]

    def state_of(self, name: str) -> dict[str, Tensor]:
        """Return the state of one site, by key: views of `state`, which may be written to."""
        return {key: value[self._where[name]] for key, value in self.state.items()}

    def shares(self, name: str, threshold: float) -> tuple[float, float]:
        """Return the shares of a site's weights that oscillate and that are frozen; no weight counts as both."""
        state = self.state_of(name)
        moving = state["frequency"] > threshold
        if not self.freezes:
            return float(moving.float().mean()), 0.0
        frozen = state["frozen"]
        return float((moving & ~frozen).float().mean()), float(frozen.float().mean())

    def load(self, tensors: Mapping[str, Tensor], bits: Mapping[str, int]) -> None:
        """Go on from a state `KEY/SITE` and the bits for which it holds, by site."""
        self._read_bits()
        for name, stride in zip(self.sites, self._strides, strict=True):
            self.bits[name] = bits[name]
            for key, value in self.state_of(name).items():
                saved = tensors[f"{key}/{name}"]  # of the whole weight, if it could be frozen when it was saved
                value.copy_(saved if saved.shape == value.shape else saved[::stride])

    @torch.no_grad()
    def hold(self) -> None:
        """Note the values of the weights before a step changes them."""
        if self._held is None:
            self._held = [weight.clone() for weight in self.weights()]
        for held, weight in zip(self._held, self.weights(), strict=True):
            held.copy_(weight)

    @torch.no_grad()
    def update(self, threshold: float) -> None:
        """Follow the codes over a step; freeze weights whose frequency is above the threshold.

        What the step did to weights that are frozen already is undone first.
        """
        self._restart_changed()
        if self.freezes:
            self._give_back()
        state, codes = self.state, self._codes()
        new = codes.to(torch.uint8)
        if self.freezes:
            state["average"].lerp_(codes, MOMENTUM)
        change = codes.sub_(state["code"]).sign_().to(torch.int8)
        if self.freezes:
            change.masked_fill_(state["frozen"], 0)
        turned = change * state["direction"] < 0
        state["frequency"].lerp_(turned.to(torch.float32), MOMENTUM)
        state["direction"] = torch.where(change != 0, change, state["direction"])
        if self.freezes:
            frozen = (state["frequency"] > threshold) & ~state["frozen"]
            new = torch.where(state["frozen"], state["code"], new)
            new = torch.where(frozen, state["average"].round().to(torch.uint8), new)
            state["frozen"] |= frozen
        state["code"] = new
        if self.freezes:
            self.put()

    @torch.no_grad()
    def put(self) -> None:
        """Put frozen weights where their level is now, because bounds and moments move.

        A weight that is not normalized is put to the middle of its level. A normalized weight is moved only so far
        into its level that it cannot leave it soon: its value is a part of the mean and the std by which all others
        are measured, and levels may lie several std from where the weights are. (With the middle of levels at 3 std,
        1 bit, and most weights frozen, the std would grow without end.) Normalized weights are moved twice, because
        moving them changes mean and std a little.
        """
        level, slack = self.state["code"].to(torch.float32), self._slack()
        for _ in range(2 if self._normalized else 1):
            origin, scale = self._grid()
            place = self._positions(origin, scale).add_(self._offset)
            target = torch.minimum(torch.maximum(place, level - slack), level + slack)
            moved = (target - self._offset) * self._of_each(scale) + self._of_each(origin)
            moving = self.state["frozen"] & (target != place) if self._normalized else self.state["frozen"]
            self._write(moving, moved)

    def _write(self, moving: Tensor, values: Tensor) -> None:
        """Give the weights that are moving, `(N,)`, new values."""
        parts = zip(self.weights(), moving.split(self._sizes), values.split(self._sizes), strict=True)
        for weight, here, value in parts:
            new = value.reshape(weight.shape).to(weight.dtype)
            weight.copy_(torch.where(here.reshape(weight.shape), new, weight))

    def _give_back(self) -> None:
        """Undo what the step did to frozen weights by gradient, momentum and weight decay."""
        if self._held is not None:
            self._write(self.state["frozen"], torch.cat([held.reshape(-1) for held in self._held]))

    def _restart_changed(self) -> None:
        """Start the sites anew whose quantizers have changed their bits."""
        changed = [name for name, q in zip(self.sites, self._quantizers, strict=True) if q.bits != self.bits[name]]
        if changed:
            self._read_bits()
            fresh = self._fresh()
            for name in changed:
                for key, value in self.state_of(name).items():
                    value.copy_(fresh[key][self._where[name]])

    def _fresh(self) -> dict[str, Tensor]:
        """Return the state of weights that are followed from now on."""
        codes = self._codes()
        state = {
            "code": codes.to(torch.uint8),
            "direction": torch.zeros_like(codes, dtype=torch.int8),
            "frequency": torch.zeros_like(codes),
        }
        if self.freezes:
            state |= {"average": codes, "frozen": torch.zeros_like(codes, dtype=torch.bool)}
        return state

    def _read_bits(self) -> None:
        """Note the bits of the quantizers, and the levels that follow from them."""
        self.bits = {name: quantizer.bits for name, quantizer in zip(self.sites, self._quantizers, strict=True)}
        tops, offsets = [q.top for q in self._quantizers], [lowest_level(q) for q in self._quantizers]
        self._tops = self._spread(tops, self._counts)
        counts = self._sizes if len(self.sites) > 1 else [1]
        self._high, self._offset = self._spread(tops, counts), self._spread(offsets, counts)
        self._low = -self._offset

    def _spread(self, values: list[int], counts: list[int]) -> Tensor:
        """Return one value per site, each repeated as often as `counts` says, as float32 on the sites' device."""
        found = torch.tensor(values, dtype=torch.float32).repeat_interleave(torch.tensor(counts))
        return found.to(self.weights()[0].device)

    @torch.no_grad()
    def _codes(self) -> Tensor:
        """Return the current codes as float32."""
        return self._positions(*self._grid()).round_().add_(self._offset)

    def _positions(self, origin: Tensor, scale: Tensor) -> Tensor:
        """Return where the weights lie on their grids, in levels from the origin, clipped to the levels; float32."""
        followed = [w.reshape(-1)[::stride] for w, stride in zip(self.weights(), self._strides, strict=True)]
        x = torch.cat(followed).to(torch.float32).sub_(self._of_each(origin)).div_(self._of_each(scale))
        return x.clamp_(self._low, self._high)

    def _grid(self) -> tuple[Tensor, Tensor]:
        """Return `origin` and `scale` of each bound, float32."""
        lower, upper = (bound.to(torch.float32) for bound in self._bounds())
        scale = (upper - lower).clamp_(min=TINY).div_(self._tops)
        if not self._normalized:
            return lower, scale
        moments = [q.moments(weight) for q, weight in zip(self._quantizers, self.weights(), strict=True)]
        mean, std = (torch.cat([m for m in of_sites if m is not None]) for of_sites in zip(*moments, strict=True))
        return (lower * std + mean).to(torch.float32), (scale * std).to(torch.float32)

    def _bounds(self) -> tuple[Tensor, Tensor]:
        """Return lower and upper bounds; the lower one is 0 where zero is a level: positions count from zero then."""
        upper = torch.cat([quantizer.upper.detach().reshape(-1) for quantizer in self._quantizers])
        if self._normalized:
            return torch.cat([quantizer.lower.detach().reshape(-1) for quantizer in self._quantizers]), upper
        return upper * self._sign, upper

    def _slack(self) -> Tensor | float:
        """Return how far from the middle of its level a frozen weight may lie, in levels: 0 if not normalized."""
        if not self._normalized:
            return 0.0
        lower, upper = self._bounds()
        scale = (upper - lower).float().clamp_(min=TINY).div_(self._tops)
        return self._of_each(0.5 - (MARGIN / scale).clamp(max=0.5 - MIDDLE))

    def _bound_of_each(self) -> Tensor | None:
        """Return the index of the bound of each followed weight, `(N,)`; None where there is one bound for all."""
        if sum(self._counts) == 1:
            return None
        firsts = accumulate(self._counts[:-1], initial=0)
        channels = [
            _channels(quantizer, weight) for quantizer, weight in zip(self._quantizers, self.weights(), strict=True)
        ]
        parts = zip(firsts, channels, self._strides, strict=True)
        return torch.cat([first + channel[::stride] for first, channel, stride in parts])

    def _of_each(self, bound: Tensor) -> Tensor:
        """Return the value of its bound for each weight: from `(B,)` to `(N,)`."""
        return bound if self._which is None else bound[self._which]


def _quantizer(site: QuantizedSite) -> WeightQuantizer:
    assert isinstance(site.weight_quantizer, WeightQuantizer)
    return site.weight_quantizer


def _weight(site: QuantizedSite) -> Tensor:
    weight = site.float_weight()
    assert weight is not None
    return weight


def _channels(quantizer: WeightQuantizer, weight: Tensor) -> Tensor:
    """Return the channel of each weight, in the order of its elements; 0 where one bound is for all."""
    if not quantizer.per_channel:
        return torch.zeros(weight.numel(), dtype=torch.int64, device=weight.device)
    layout = quantizer.layout
    channel = torch.arange(layout.channels, device=weight.device).reshape(layout.bound_view).expand(layout.view)
    return channel.reshape(-1)
