"""Quantizers: small modules with learned bounds; float in, integer-valued operand out, codes on request."""

from daqconvert.quantizers.input import InputQuantizer
from daqconvert.quantizers.layout import ChannelLayout
from daqconvert.quantizers.weight import WeightQuantizer

__all__ = ["ChannelLayout", "InputQuantizer", "WeightQuantizer"]
