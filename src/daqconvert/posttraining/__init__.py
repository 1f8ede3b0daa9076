"""What improves a quantized model without labels and without training it as a whole: GPTQ, blocks, batch norms."""

from daqconvert.posttraining.gptq import choose_codes
from daqconvert.posttraining.norms import batch_norms, estimate
from daqconvert.posttraining.reconstruction import reconstruct
from daqconvert.posttraining.sizes import bounds_and_scales, parameter_sizes, step_in_sizes

__all__ = [
    "batch_norms",
    "bounds_and_scales",
    "choose_codes",
    "estimate",
    "parameter_sizes",
    "reconstruct",
    "step_in_sizes",
]
