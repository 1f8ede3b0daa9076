"""An exponential moving average of the weights, evaluated and kept instead of them.

    average = decay * average + (1 - decay) * weights,   decay = ema, or with warm-up min(ema, 1 - step ** (-2/3))

after every optimizer step, counted from 1; the average starts with the weights after the first step. Averaged are all
parameters and floating-point buffers, each once however many names it has; flags, signs and counts are copied. Bounds
and scales are averaged too, so an averaged model is a quantized model like any other. If the model has changed its
bits (`progressive`), the average changes its own before it takes a step in.

Source: timm, `timm.utils.ModelEmaV3`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from daqconvert.layers.site import QuantizedSite
from daqconvert.models import copy_model, quantized_sites
from daqconvert.training.parts.scheduled import set_site_bits
from daqconvert.training.run import Part, Step

HALVES = (torch.float16, torch.bfloat16)  # too coarse for what one step adds: averaged in float32


class Average(Part):
    """Keeps the average, and puts it in place of the weights for evaluations and after the last epoch.

    Args:
        model: The model in training.
        decay: Decay of the average, below 1.
        warmup: Whether the decay starts small.
    """

    name: ClassVar[str] = "ema"

    def __init__(self, model: nn.Module, decay: float, *, warmup: bool) -> None:
        self.model, self.decay, self.warmup = model, decay, warmup
        self._average: Any = None
        self._sites: list[tuple[QuantizedSite, QuantizedSite]] = []
        self._kept: Pairs | None = None

    @property
    def module(self) -> nn.Module:
        """The averaged model, which holds the values and is never called."""
        found: nn.Module = self._average.module
        return found

    def start(self) -> None:
        """Begin with the weights as they are."""
        from timm.utils import ModelEmaV3

        halves = any(tensor.dtype in HALVES for tensor in self.model.parameters())
        self._average = ModelEmaV3(copy_model(self.model), decay=self.decay, use_warmup=self.warmup)
        if halves:
            self.module.float()
        averaged = quantized_sites(self.module)
        self._sites = [(averaged[name], site) for name, site in quantized_sites(self.model).items()]
        self._kept = None

    @torch.no_grad()
    def after_step(self, step: Step) -> None:
        """Add the weights after this step to the average."""
        self._follow()
        weight = 1.0 - self._average.get_decay(step.number)
        if self._kept is None or not self._kept.valid():
            self._kept = Pairs(self.module, self.model)
        for copied, values in self._kept.copied:
            torch._foreach_copy_(copied, values)
        averaged, new = self._kept.averaged
        new = [t if t.dtype == mean.dtype else t.to(mean.dtype) for mean, t in zip(averaged, new, strict=True)]
        torch._foreach_lerp_(averaged, new, weight=weight)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Give the model the averaged values, and its own back afterwards, bit for bit."""
        self._follow()
        pairs = _pairs(self.module, self.model)
        before = [theirs.detach().clone() for _, theirs in pairs]
        try:
            self.finish()
            yield
        finally:
            with torch.no_grad():
                for (_, theirs), value in zip(pairs, before, strict=True):
                    theirs.copy_(value)

    @torch.no_grad()
    def finish(self) -> None:
        """Leave the averaged values in the model."""
        self._follow()
        for ours, theirs in _pairs(self.module, self.model):
            theirs.copy_(ours)

    def tensors(self) -> dict[str, Tensor]:
        """Return the averaged model's state."""
        found: dict[str, Tensor] = self.module.state_dict()
        return found

    def load(self, tensors: dict[str, Tensor], meta: Any) -> None:
        """Load an averaged model's state; the model already has the bits that go with it."""
        self._follow()
        self.module.load_state_dict(tensors)

    def _follow(self) -> None:
        """Give the average the bits that the model has, and adapt its bounds."""
        for ours, theirs in self._sites:
            if ours.settings is not theirs.settings:
                set_site_bits(ours, theirs.settings)


class Pairs:
    """The tensors that a step reads and writes, as lists that are made once.

    Attributes:
        averaged: Tensors that are averaged: those of the average, and those of the model in training.
        copied: Pairs of such lists for tensors that are copied, one pair for each dtype and device.
    """

    def __init__(self, average: nn.Module, model: nn.Module) -> None:
        self.averaged: tuple[list[Tensor], list[Tensor]] = ([], [])
        copied: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
        for ours, theirs in _pairs(average, model):
            key = ours.dtype, theirs.dtype, ours.device
            lists = self.averaged if ours.is_floating_point() else copied.setdefault(key, ([], []))
            lists[0].append(ours)
            lists[1].append(theirs)
        self.copied = list(copied.values())
        owners = [tensors for m in model.modules() for tensors in (m._parameters, m._buffers)]
        self._owned = [(owner, name, value) for owner in owners for name, value in owner.items()]
        own = {id(value) for _, _, value in self._owned}
        self._own = all(id(theirs) in own for _, found in (self.averaged, *self.copied) for theirs in found)

    def valid(self) -> bool:
        """Whether the model still has these tensors; always False if its state dict computes some of them."""
        return self._own and all(owner.get(name) is value for owner, name, value in self._owned)


def _pairs(average: nn.Module, model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Return pairs of a tensor of the average and the one of the model, each tensor of the model once."""
    ours, theirs = average.state_dict(keep_vars=True), model.state_dict(keep_vars=True)
    unique = {id(value): (ours[key], value) for key, value in theirs.items() if isinstance(value, Tensor)}
    return list(unique.values())
