"""Quantizers: small modules with learned bounds; float in, integer-valued operand out, codes on request."""

from daqconvert.quantizers.input import InputQuantizer
from daqconvert.quantizers.weight import ChannelLayout, WeightQuantizer

__all__ = ["ChannelLayout", "InputQuantizer", "WeightQuantizer"]
