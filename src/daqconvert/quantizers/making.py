"""The quantizer that a site's settings ask for."""

from __future__ import annotations

from torch import Tensor

from daqconvert.quantizers.input import InputQuantizer, SymmetricInputQuantizer
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
    bits = settings.a_bits if role == "input" else settings.w_bits
    if settings.symmetric and bits == 8:
        signed = True  # unsigned it would have codes above 127; signed it has as many codes above zero as 7 bits have
    cls = SymmetricInputQuantizer if settings.symmetric else InputQuantizer
    cls = StepInputQuantizer if settings.rounding == "lsq" else cls  # whose zero point is in the middle as well
    return cls(settings, signed, name, like, role)
