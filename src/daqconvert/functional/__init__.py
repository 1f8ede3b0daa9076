"""Tensors in, tensors out: the rounding and its gradient, grids and codes, bit packing; no module, no config."""

from daqconvert.functional.dasr import dasr, round_half_even, slope, slope_coefficients
from daqconvert.functional.packing import pack, unpack

__all__ = ["dasr", "pack", "round_half_even", "slope", "slope_coefficients", "unpack"]
