"""Quantized and frozen convolutions and linears, one file per family, found by exact type in `registry`."""

from daqconvert.layers import conv, conv_transpose, linear
from daqconvert.layers.base import QuantizedLayer
from daqconvert.layers.frozen import FrozenLayer
from daqconvert.layers.frozen_site import FrozenSite
from daqconvert.layers.registry import frozen_class, is_site_type, quantized_class, register
from daqconvert.layers.site import QuantizedSite

__all__ = [
    "FrozenLayer",
    "FrozenSite",
    "QuantizedLayer",
    "QuantizedSite",
    "conv",
    "conv_transpose",
    "frozen_class",
    "is_site_type",
    "linear",
    "quantized_class",
    "register",
]
