"""Optimizers: which parameters they train, how these decay, what the learning rates are, and state as flat tensors.

Quantizer parameters (`lower`, `upper`, `output_scale`) have an optimizer of their own, as published Adam without
weight decay; everything else another, as published SGD with momentum. Both are names of timm's factory.

Source: "Distance-aware Quantization" (Kim, Lee, Ham, ICCV 2021) and its published training code; timm,
https://github.com/huggingface/pytorch-image-models, `timm.optim`.
"""

from daqconvert.training.optim.groups import QUANTIZERS, WEIGHTS, parameter_groups
from daqconvert.training.optim.optimizers import Optimizers, lr_factor

__all__ = ["QUANTIZERS", "WEIGHTS", "Optimizers", "lr_factor", "parameter_groups"]
