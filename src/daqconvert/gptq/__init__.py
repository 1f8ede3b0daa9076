"""GPTQ: weights get the codes with which a layer's outputs stay what they were, not the nearest ones.

Rounding to the nearest level minimizes the error of the weight. What matters is the error of the layer's output, where
the errors of many weights add up or cancel, as their inputs are correlated. For a weight `W` and inputs `X`, columns
side by side, as the quantized layers before it and their quantizers give them,

    minimize  || Q X - W X ||^2   over weights Q on the grid

for which second moments of a few hundred images' inputs are enough: no labels, no gradients, no epochs.

Reference: "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (Frantar, Ashkboos,
Hoefler, Alistarh, ICLR 2023), https://arxiv.org/abs/2210.17323.
"""

from daqconvert.gptq.choosing import choose_codes

__all__ = ["choose_codes"]
