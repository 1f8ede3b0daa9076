"""Improving a quantized model without labels and without training it as a whole: GPTQ, blocks, batch norms.

`choose_codes` (GPTQ) and `reconstruct` (block reconstruction) take a calibrated model, some batches of inputs and the
names of its blocks, change the model in place and return the error of each layer or block before and after.
`reestimate` replaces the running statistics of batch norms. `parameter_sizes` and `step_in_sizes` let an optimizer
step in units of each parameter's size; training uses them as well.
"""

from daqconvert.posttraining.blocks import block_names
from daqconvert.posttraining.gptq import choose_codes
from daqconvert.posttraining.norms import batch_norms, reestimate
from daqconvert.posttraining.reconstruction import reconstruct
from daqconvert.posttraining.sizes import bounds_and_scales, parameter_sizes, step_in_sizes

__all__ = [
    "batch_norms",
    "block_names",
    "bounds_and_scales",
    "choose_codes",
    "parameter_sizes",
    "reconstruct",
    "reestimate",
    "step_in_sizes",
]
