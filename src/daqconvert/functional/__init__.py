"""Functions of tensors: the rounding and its gradient, grids and codes, bit packing; no modules, no settings."""

from daqconvert.functional.dasr import dasr, round_half_even, slope, slope_coefficients
from daqconvert.functional.packing import pack, unpack

__all__ = ["dasr", "pack", "round_half_even", "slope", "slope_coefficients", "unpack"]
