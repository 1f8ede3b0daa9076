"""Quantized and frozen convolutions and linears, one file per family, found by exact type in `registry`."""

from daqconvert.layers import families
from daqconvert.layers.base import QuantizedLayer
from daqconvert.layers.frozen import FrozenLayer
from daqconvert.layers.frozen_site import FrozenSite
from daqconvert.layers.lookup import frozen_class, quantized_class
from daqconvert.layers.registry import is_site_type, register
from daqconvert.layers.site import QuantizedSite

__all__ = [
    "FrozenLayer",
    "FrozenSite",
    "QuantizedLayer",
    "QuantizedSite",
    "families",
    "frozen_class",
    "is_site_type",
    "quantized_class",
    "register",
]
