"""The codes of a site's weights over the steps: how often they change back, and how frozen ones are held.

With `o_t = 1` where the code changes at step t in the direction opposite to its last change, else 0:

    frequency   f_t = m * o_t + (1 - m) * f_{t-1},   m = 0.01
    average     a_t = m * code_t + (1 - m) * a_{t-1}

A weight oscillates where `f` is above a threshold. Frozen, it has the code `round(a)` of that moment from then on.

Reference: "Overcoming Oscillations in Quantization-Aware Training" (Nagel, Fournarakis, Bondarenko, Blankevoort, ICML
2022), https://arxiv.org/abs/2203.11086.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from daqconvert.functional.grid import TINY
from daqconvert.layers.site import QuantizedSite
from daqconvert.quantizers import WeightQuantizer
from daqconvert.training.parts.measures import lowest_level

MOMENTUM = 0.01
SAMPLE = 4096  # weights of a site that are looked at where nothing is frozen
MARGIN = 0.1  # std: how far from the edge of its level a frozen weight must lie where weights are normalized ...
MIDDLE = 0.25  # ... but nearer to the middle than this part of a step it need not be


class Track:
    """Codes of one site's weights over the steps.

    Args:
        site: With a `WeightQuantizer`.
        most: Weights to follow, evenly spread; None for all, which may be frozen then.

    Attributes:
        bits: For which the state holds; other bits start it anew.
        stride: Every how many weights one is followed.
        channel: The channel of each weight that is followed; None where one bound is for all.
        state: `code` (uint8), `direction` (int8, of the last change), `frequency`; and, where weights may be frozen,
            `average` and `frozen` (bool).
    """

    def __init__(self, site: QuantizedSite, most: int | None = SAMPLE) -> None:
        weight = weight_of(site)
        self.site, self.numel, self.freezes = site, weight.numel(), most is None
        self.stride = 1 if most is None else math.ceil(weight.numel() / most)
        self.channel = _channels(quantizer_of(site), self.stride, weight.device)
        self._held: Tensor | None = None
        self.restart()

    @property
    def outdated(self) -> bool:
        """Whether the quantizer has other bits by now."""
        return quantizer_of(self.site).bits != self.bits

    def restart(self) -> None:
        """Forget everything, and start from the codes of now."""
        self.bits = quantizer_of(self.site).bits
        _, codes = self._codes()
        self.state = {
            "code": codes.to(torch.uint8),
            "direction": torch.zeros_like(codes, dtype=torch.int8),
            "frequency": torch.zeros_like(codes),
        }
        if self.freezes:
            self.state["average"] = codes.clone()
            self.state["frozen"] = torch.zeros_like(codes, dtype=torch.bool)

    @torch.no_grad()
    def hold(self) -> None:
        """Note the values of the weights before a step changes them."""
        if self.freezes:
            weight = weight_of(self.site)
            self._held = weight.detach().clone() if self._held is None else self._held.copy_(weight.detach())

    @torch.no_grad()
    def update(self, threshold: float) -> None:
        """Take notice of the codes after a step; freeze what oscillates, and undo what the step did to the frozen.

        Args:
            threshold: Frequency from which a weight oscillates.
        """
        if self.outdated:
            self.restart()
            return
        if self.freezes:
            self._give_back()
        _, codes = self._codes()
        state = self.state
        change = torch.sign(codes - state["code"]).to(torch.int8)
        if self.freezes:
            change.masked_fill_(state["frozen"], 0)
        turned = (change != 0) & (change == -state["direction"])
        state["frequency"].lerp_(turned.to(torch.float32), MOMENTUM)
        state["direction"] = torch.where(change != 0, change, state["direction"])
        new = codes.to(torch.uint8)
        if not self.freezes:
            state["code"] = new
            return
        state["code"] = torch.where(state["frozen"], state["code"], new)
        state["average"].lerp_(codes, MOMENTUM)
        frozen = (state["frequency"] > threshold) & ~state["frozen"]
        state["code"] = torch.where(frozen, state["average"].round().to(torch.uint8), state["code"])
        state["frozen"] |= frozen
        self.put()

    def shares(self, threshold: float) -> tuple[float, float]:
        """Return the shares of the weights that oscillate, and that are frozen.

        Args:
            threshold: Frequency from which a weight oscillates; a frozen one does not.
        """
        moving = self.state["frequency"] > threshold
        if not self.freezes:
            return float(moving.float().mean()), 0.0
        frozen = self.state["frozen"]
        return float((moving & ~frozen).float().mean()), float(frozen.float().mean())

    def weight(self) -> Tensor:
        """Return the weight, without a graph."""
        return weight_of(self.site).detach()

    def _give_back(self) -> None:
        """Undo what the step did to frozen weights: gradient, momentum, weight decay."""
        weight = weight_of(self.site)
        if self._held is not None:
            weight.copy_(torch.where(self.state["frozen"].reshape(weight.shape), self._held, weight))

    @torch.no_grad()
    def put(self) -> None:
        """Put frozen weights where their level is now, for bounds and moments move.

        In real units that is the middle of the level. A normalized weight goes only so far into its level that it
        cannot leave it soon: its value is a part of the mean and the std by which all others are measured, and levels
        may lie several std from where the weights are. (With the middle of levels at 3 std, 1 bit, and most weights
        frozen, the std would grow without end.) Twice, for putting it there moves mean and std a little.
        """
        quantizer, weight = quantizer_of(self.site), weight_of(self.site)
        level, slack = self.state["code"].to(torch.float32), self._slack()
        for _ in range(2 if quantizer.normalize else 1):
            place, _ = self._codes()
            target = torch.minimum(torch.maximum(place, level - slack), level + slack)
            origin, step, offset = self._grid()
            moved = ((target - offset) * step + origin).reshape(weight.shape)
            moving = self.state["frozen"] & ((target != place) if quantizer.normalize else True)
            weight.copy_(torch.where(moving.reshape(weight.shape), moved.to(weight.dtype), weight))

    @torch.no_grad()
    def _codes(self) -> tuple[Tensor, Tensor]:
        """Return the places of the weights among the levels, clipped to them, and the codes; both float32."""
        quantizer = quantizer_of(self.site)
        origin, step, offset = self._grid()
        x = (weight_of(self.site).detach().reshape(-1)[:: self.stride].to(torch.float32) - origin) / step
        x = x.clamp(-offset, float(quantizer.top))
        return x + offset, x.round() + offset

    def _grid(self) -> tuple[Tensor, Tensor, float]:
        """Return `origin`, `step`, `offset` of `W = (code - offset) * step + origin`, for the weights followed."""
        quantizer = quantizer_of(self.site)
        upper = quantizer.upper.detach().to(torch.float32)
        if quantizer.grid != "midrise":
            step = upper.clamp(min=TINY) / quantizer.top
            return torch.zeros((), device=upper.device), self._each(step), float(lowest_level(quantizer))
        mean, std = quantizer.moments(weight_of(self.site).detach())
        lower = -upper if quantizer.own_lower is None else quantizer.own_lower.detach().to(torch.float32)
        step, origin = (upper - lower).clamp(min=TINY) / quantizer.top, lower
        if mean is not None and std is not None:
            shape = upper.shape
            step, origin = step * std.reshape(shape), lower * std.reshape(shape) + mean.reshape(shape)
        return self._each(origin.to(torch.float32)), self._each(step.to(torch.float32)), 0.0

    def _slack(self) -> Tensor | float:
        """Return how far from the middle of its level a frozen weight may lie, in steps: 0 in real units."""
        quantizer = quantizer_of(self.site)
        if quantizer.own_lower is None:
            return 0.0
        step = (quantizer.upper.detach() - quantizer.own_lower.detach()).float().clamp(min=TINY) / quantizer.top
        return self._each(0.5 - (MARGIN / step).clamp(max=0.5 - MIDDLE))

    def _each(self, bound: Tensor) -> Tensor:
        return bound if self.channel is None else bound[self.channel]


def quantizer_of(site: QuantizedSite) -> WeightQuantizer:
    """Return the quantizer of a site's weight."""
    assert isinstance(site.weight_quantizer, WeightQuantizer)
    return site.weight_quantizer


def weight_of(site: QuantizedSite) -> Tensor:
    """Return the float weight of a site."""
    weight = site.float_weight()
    assert weight is not None
    return weight


def _channels(quantizer: WeightQuantizer, stride: int, device: torch.device) -> Tensor | None:
    """Return the channel of each weight that is followed; None where one bound is for all."""
    if not quantizer.per_channel:
        return None
    layout = quantizer.layout
    channel = torch.arange(layout.channels, device=device).reshape(layout.bound_view).expand(layout.view)
    return channel.reshape(-1)[::stride].contiguous()
