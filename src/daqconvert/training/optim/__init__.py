"""The two optimizers of a run: which parameters they train, weight decay, learning rates, and their state.

One trains the quantizer parameters (`lower`, `upper`, `step`, `output_scale`); in the published training it is Adam
without weight decay. The other trains everything else; in the published training it is SGD with momentum.

Source: "Distance-aware Quantization" (Kim, Lee, Ham, ICCV 2021) and its published training code; timm,
https://github.com/huggingface/pytorch-image-models, `timm.optim`.
"""

from daqconvert.training.optim.groups import QUANTIZERS, WEIGHTS, lr_factor, parameter_groups
from daqconvert.training.optim.optimizers import Optimizers

__all__ = ["QUANTIZERS", "WEIGHTS", "Optimizers", "lr_factor", "parameter_groups"]
