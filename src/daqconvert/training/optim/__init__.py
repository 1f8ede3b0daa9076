"""Optimizers: which parameters they train, how these decay, what the learning rates are, and state as flat tensors.

There are two. Quantizer parameters (`lower`, `upper`, `step`, `output_scale`) have one of their own, which is Adam
without weight decay in the published training; everything else has the other, which is SGD with momentum there.

Source: "Distance-aware Quantization" (Kim, Lee, Ham, ICCV 2021) and its published training code; timm,
https://github.com/huggingface/pytorch-image-models, `timm.optim`.
"""

from daqconvert.training.optim.groups import QUANTIZERS, WEIGHTS, lr_factor, parameter_groups
from daqconvert.training.optim.optimizers import Optimizers

__all__ = ["QUANTIZERS", "WEIGHTS", "Optimizers", "lr_factor", "parameter_groups"]
