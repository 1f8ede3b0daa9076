"""The tracks of many sites as one: a step costs a few operations, not some twenty a site.

What is followed of each weight stands in one tensor, and the grid of each site in one element a bound, `(B,)`; `which`
says which bound is whose, `(N,)`. Values are those of `Track.update`, bit for bit on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate

import torch
from torch import Tensor

from daqconvert.functional.grid import TINY
from daqconvert.quantizers import WeightQuantizer
from daqconvert.training.parts.measures import lowest_level
from daqconvert.training.parts.tracks import MOMENTUM, Track, quantizer_of, weight_of


class Together:
    """Tracks that only look, on one device and of one dtype, updated as one; their states become parts of its own.

    Args:
        tracks: Without freezing.
    """

    def __init__(self, tracks: list[Track]) -> None:
        self.tracks = tracks
        sizes = [len(track.state["code"]) for track in tracks]
        self.state = {key: torch.cat([track.state[key] for track in tracks]) for key in tracks[0].state}
        for key, value in self.state.items():
            for track, part in zip(tracks, value.split(sizes), strict=True):
                track.state[key] = part
        device = self.state["code"].device
        quantizers = [quantizer_of(track.site) for track in tracks]
        bounds = [quantizer.upper.detach().reshape(-1) for quantizer in quantizers]
        counts = [len(bound) for bound in bounds]
        self._which = torch.cat([
            torch.full((size,), first, device=device) if track.channel is None else track.channel + first
            for track, size, first in zip(tracks, sizes, accumulate(counts, initial=0), strict=False)
        ])  # fmt: skip
        top = torch.tensor([float(quantizer.top) for quantizer in quantizers], device=device)
        offset = torch.tensor([float(lowest_level(quantizer)) for quantizer in quantizers], device=device)
        self._tops = top.repeat_interleave(torch.tensor(counts, device=device))
        each = torch.tensor(sizes, device=device)
        self._high, self._offset = top.repeat_interleave(each), offset.repeat_interleave(each)
        self._low = -self._offset
        self._zeros = [torch.zeros_like(bound, dtype=torch.float32) for bound in bounds]
        self._ones = [torch.ones_like(zero) for zero in self._zeros]

    @staticmethod
    def of(tracks: Iterable[Track]) -> list[Together]:
        """Return what updates these tracks; those that freeze are left out.

        Args:
            tracks: Any.
        """
        groups: dict[tuple[torch.device, torch.dtype], list[Track]] = {}
        for track in tracks:
            if not track.freezes:
                weight = weight_of(track.site)
                groups.setdefault((weight.device, weight.dtype), []).append(track)
        return [Together(group) for group in groups.values()]

    @torch.no_grad()
    def update(self) -> None:
        """Take notice of the codes after a step, as `Track.update` does."""
        codes, state = self._codes(), self.state
        new = codes.to(torch.uint8)
        change = codes.sub_(state["code"]).sign_().to(torch.int8)
        turned = change * state["direction"] < 0
        state["frequency"].lerp_(turned.to(torch.float32), MOMENTUM)
        state["direction"].copy_(torch.where(change != 0, change, state["direction"]))
        state["code"].copy_(new)

    def _codes(self) -> Tensor:
        """Return the codes of now, float32."""
        weights = [weight_of(track.site).detach() for track in self.tracks]
        origin, step = self._grid(weights)
        followed = [w.reshape(-1)[:: track.stride] for w, track in zip(weights, self.tracks, strict=True)]
        x = torch.cat(followed).to(torch.float32).sub_(origin[self._which]).div_(step[self._which])
        return x.clamp_(self._low, self._high).round_().add_(self._offset)

    def _grid(self, weights: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return `origin` and `step` of `Track`, of each bound."""
        quantizers = [quantizer_of(track.site) for track in self.tracks]
        uppers = [quantizer.upper.detach().reshape(-1) for quantizer in quantizers]
        lowers = [self._lower(i, quantizer, uppers[i]) for i, quantizer in enumerate(quantizers)]
        lower, upper = torch.cat(lowers).to(torch.float32), torch.cat(uppers).to(torch.float32)
        step = (upper - lower).clamp_(min=TINY).div_(self._tops)
        if not any(quantizer.normalize for quantizer in quantizers):
            return lower, step
        means, stds = list(self._zeros), list(self._ones)
        for i, (quantizer, weight) in enumerate(zip(quantizers, weights, strict=True)):
            mean, std = quantizer.moments(weight)
            if mean is not None and std is not None and quantizer.grid == "midrise":
                means[i], stds[i] = mean, std
        every_mean, every_std = torch.cat(means), torch.cat(stds)
        return (lower * every_std + every_mean).to(torch.float32), (step * every_std).to(torch.float32)

    def _lower(self, i: int, quantizer: WeightQuantizer, upper: Tensor) -> Tensor:
        """Return the lower bound; 0 where zero is a level, from which its codes count."""
        if quantizer.grid != "midrise":
            return self._zeros[i]
        return -upper if quantizer.own_lower is None else quantizer.own_lower.detach().reshape(-1)
