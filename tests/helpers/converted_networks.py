"""Small networks that together have every kind of site, and functions to quantize and calibrate them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import daqconvert as dq
from helpers.cases import timm_network


class BareParameters(nn.Module):
    """A product and a convolution with parameters that belong to no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(6, 3, 3, 3) * 0.3)
        self.matrix = nn.Parameter(torch.randn(6, 5) * 0.3)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(F.conv2d(x, self.kernel, padding=1)).mean((2, 3))
        return self.head(torch.relu(x @ self.matrix))


def beit_block() -> nn.Module:
    """A block of BEiT: its attention reads the weight of `qkv` without calling it."""
    from timm.models.beit import Block

    return Block(16, num_heads=2, qkv_bias=True, init_values=0.5, window_size=(2, 2), drop_path=0.0)


def swin() -> nn.Module:
    """torchvision's Swin transformer: it hands the weights of two linears to a wrapped function."""
    from torchvision.models import SwinTransformer

    return SwinTransformer([4, 4], 16, [1, 1], [2, 2], [4, 4], stochastic_depth_prob=0.0, num_classes=5)


def vision_transformer() -> nn.Module:
    """torchvision's vision transformer: `nn.MultiheadAttention` in every block."""
    from torchvision.models import VisionTransformer

    return VisionTransformer(16, 8, 2, 2, 16, 32, num_classes=5)


def encoder() -> nn.Module:
    """Torch's own encoder, whose fused path calls no layer."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet": (partial(timm_network, "test_resnet", num_classes=5), (3, 32, 32)),
    "nfnet": (partial(timm_network, "test_nfnet", num_classes=5), (3, 32, 32)),
    "vit": (partial(timm_network, "test_vit", img_size=32, num_classes=5), (3, 32, 32)),
    "beit": (beit_block, (5, 16)),
    "swin": (swin, (3, 32, 32)),
    "encoder": (encoder, (6, 16)),
    "vision-transformer": (vision_transformer, (3, 16, 16)),
    "bare": (BareParameters, (3, 8, 8)),
    "linear": (lambda: nn.Linear(6, 4), (6,)),
    "conv": (lambda: nn.Conv2d(3, 4, 3), (3, 8, 8)),
}
CONVOLUTIONAL = ("resnet", "nfnet", "bare", "conv")
REWRITTEN = ("nfnet", "beit", "swin", "bare")
"""Networks with generated forwards."""


@torch.no_grad()
def lively(model: nn.Module) -> nn.Module:
    """Draw constant parameters and statistics (scales, zero heads) anew, so that every part affects the output."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point() and tensor.numel() > 1 and tensor.min() == tensor.max():
            tensor.add_(torch.rand_like(tensor) * 0.3 + 0.1)
        elif tensor.is_floating_point() and tensor.numel() == 1:
            tensor.fill_(0.7)
    return model


def batch(name: str, size: int = 2, seed: int = 0) -> Tensor:
    """Return a seeded batch for a network."""
    return torch.randn(size, *NETWORKS[name][1], generator=torch.Generator().manual_seed(seed))


def float_network(name: str) -> nn.Module:
    """Return a network with random weights, the same on every call, in evaluation mode."""
    torch.manual_seed(0)
    return lively(NETWORKS[name][0]()).eval()


@cache
def _built(name: str, bits: int) -> nn.Module:
    ends = (bits, bits)
    qmodel = dq.quantize(float_network(name), w_bits=bits, a_bits=bits, first=ends, last=ends)
    dq.calibrate(qmodel, [batch(name, 4)])
    return qmodel.eval()


def quantized(name: str, bits: int = 4) -> nn.Module:
    """Return a quantized and calibrated network in evaluation mode, new on every call."""
    return copy.deepcopy(_built(name, bits))
