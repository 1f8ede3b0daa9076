"""The quantizer that a site's settings ask for."""

from __future__ import annotations

from torch import Tensor

from daqconvert.quantizers.input import InputQuantizer
from daqconvert.quantizers.layout import ChannelLayout
from daqconvert.quantizers.lsq import StepInputQuantizer, StepWeightQuantizer
from daqconvert.quantizers.weight import WeightQuantizer
from daqconvert.spec import Settings


def make_weight_quantizer(settings: Settings, layout: ChannelLayout, name: str, like: Tensor) -> WeightQuantizer:
    """Return the quantizer of a site's weight; `name` is the site's, `like` has the model's dtype and device."""
    return (StepWeightQuantizer if settings.rounding == "lsq" else WeightQuantizer)(settings, layout, name, like)


def make_input_quantizer(
    settings: Settings, signed: bool | None, name: str, like: Tensor, role: str = "input"
) -> InputQuantizer:
    """Return the quantizer of a site's input, or with `role="weight"` of a weight that depends on the data.

    `signed` is None while the sign is undecided; `name` is the site's, `like` has the model's dtype and device.
    """
    cls = StepInputQuantizer if settings.rounding == "lsq" else InputQuantizer
    return cls(settings, signed, name, like, role)
