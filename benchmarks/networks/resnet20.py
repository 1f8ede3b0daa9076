"""The ResNet-20 of the DAQ authors' CIFAR-10 code: 272,000 parameters, parameter-free shortcuts.

3x3 stem of 16 channels without batch norm, ReLU; three stages of three basic blocks (16, 32, 64 channels; the stride-2
shortcut takes every second pixel and pads channels with zeros on both sides); global average pool; `BatchNorm1d(64)`;
linear.

Reference: "Distance-aware Quantization" (Kim, Lee, Ham, ICCV 2021), the authors' published training code.
"""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm and a shortcut without parameters."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride, self.padding = stride, (channels - in_channels) // 2

    def forward(self, x: Tensor) -> Tensor:
        """Return `relu(block(x) + shortcut(x))`."""
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride != 1 or self.padding:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(out + x)


class ResNet20(nn.Module):
    """ResNet-20 for 32 x 32 images."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.layer1 = self._stage(16, 16, 1)
        self.layer2 = self._stage(16, 32, 2)
        self.layer3 = self._stage(32, 64, 2)
        self.bn2 = nn.BatchNorm1d(64)
        self.linear = nn.Linear(64, num_classes)

    @staticmethod
    def _stage(in_channels: int, channels: int, stride: int) -> nn.Sequential:
        stage = nn.Sequential()
        for i in range(3):
            block = BasicBlock(channels if i else in_channels, channels, 1 if i else stride)
            stage.add_module(f"block_{i}", nn.Sequential(block))
        return stage

    def forward(self, x: Tensor) -> Tensor:
        """Return logits `(N, num_classes)` of images `(N, 3, 32, 32)`."""
        x = F.relu(self.conv1(x))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(self.bn2(F.adaptive_avg_pool2d(x, 1).flatten(1)))


def resnet20(weights: str | Path | None = None) -> ResNet20:
    """Return the network, with the weights of a safetensors file where one is given."""
    model = ResNet20()
    if weights is not None:
        model.load_state_dict(load_file(str(weights)))
    return model.eval()
