"""Block reconstruction: block after block learns to return what it returned in float, from the inputs it will get.

    minimize  || B_q(x_q) - B(x) ||^2 / || B(x) ||^2   over the parameters of one block

where `x` is what the float network gives the block `B`, and `x_q` what the quantized blocks before it give. What a few
hundred images teach a whole network by its logits is soon learned by heart; a block's outputs are thousands of numbers
for every image, and with the blocks before it finished, a block does not run after inputs that move.

Reference: "BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction" (Li et al., ICLR 2021),
https://arxiv.org/abs/2102.05426, section 3.2 and algorithm 1, with the squared error for its Fisher-weighted one, and
with weights that move freely under the gradient of their rounding instead of up or down.
"""

from daqconvert.reconstruction.reconstructing import reconstruct

__all__ = ["reconstruct"]
