"""Sites as torch modules: quantized and frozen layers, holders of call sites, attention, output quantizers."""

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
