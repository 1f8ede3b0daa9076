"""Small networks that together join the outputs of layers in every way that integer deployment has to handle."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import daqconvert as dq


def conv(inputs: int, outputs: int, size: int = 3, **kwargs: object) -> nn.Sequential:
    """Convolution, batch norm, ReLU6."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False, **kwargs), nn.BatchNorm2d(outputs), nn.ReLU6()
    )  # fmt: skip


class Block(nn.Module):
    """A residual block: one ReLU called twice, a sum in place."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1), nn.BatchNorm2d(outputs)
        self.down = nn.Sequential(nn.Conv2d(inputs, outputs, 1, 2, bias=False), nn.BatchNorm2d(outputs))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += self.down(x)
        return self.relu(out)


class Residual(nn.Module):
    """Stem, max pool, a residual block, pooling, classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.pool = conv(3, 8, 5), nn.MaxPool2d(3, 2, 1)
        self.block, self.gap, self.fc = Block(8, 12), nn.AdaptiveAvgPool2d(1), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.gap(self.block(self.pool(self.stem(x)))).flatten(1))


class Inverted(nn.Module):
    """Depthwise, a linear bottleneck, a sum that is returned."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.expand, self.depth = conv(channels, 12, 1), conv(12, 12, 3, groups=12)
        self.project, self.bn = nn.Conv2d(12, channels, 1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bn(self.project(self.depth(self.expand(x))))


class Joined(nn.Module):
    """Branches of different kinds, joined; the second convolution of one branch pads by reflection."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(6, 4, 1), nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect")
        self.pool, self.c = nn.MaxPool2d(3, 1, 1), nn.Conv2d(14, 6, 1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.cat([self.a(x), self.b(x), self.pool(x)], 1))


class Gated(nn.Module):
    """SiLU behind the batch norm, and a gate."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.SiLU()
        self.reduce, self.expand = nn.Conv2d(channels, 2, 1), nn.Conv2d(2, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn(self.conv(x)))
        return x * self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True)))).sigmoid()


class Head(nn.Module):
    """Linears with a ReLU between: the first is rounded to the grid of the second."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.one, self.two = nn.Conv2d(3, 4, 3, stride=3), nn.Linear(36, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(F.relu(self.one(F.relu(self.conv(x)).flatten(1))))


NETWORKS = {
    "residual": (Residual, (3, 16, 16)),
    "inverted": (lambda: nn.Sequential(conv(3, 6), Inverted(6), Inverted(6), nn.Conv2d(6, 2, 1)), (3, 8, 8)),
    "joined": (lambda: nn.Sequential(conv(3, 6), Joined(), nn.Flatten(), nn.Linear(6 * 64, 4)), (3, 8, 8)),
    "gated": (lambda: nn.Sequential(conv(3, 6), Gated(6), nn.Conv2d(6, 3, 3)), (3, 8, 8)),
    "head": (Head, (3, 9, 9)),
    "dilated": (lambda: nn.Sequential(nn.Conv2d(2, 4, 3, dilation=2), nn.ReLU(), nn.Conv2d(4, 2, 1)), (2, 9, 9)),
    "conv1d": (
        lambda: nn.Sequential(nn.Conv1d(3, 6, 5), nn.BatchNorm1d(6), nn.Hardtanh(-0.5, 0.75), nn.Conv1d(6, 2, 1)),
        (3, 20),
    ),
    "conv3d": (
        lambda: nn.Sequential(nn.Conv3d(1, 4, 3), nn.ReLU(), nn.MaxPool3d(2), nn.Conv3d(4, 2, 1)),
        (1, 8, 8, 8),
    ),
    "circular": (
        lambda: nn.Sequential(conv(3, 4), nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), nn.Flatten()),
        (3, 6, 6),
    ),
}  # fmt: skip


def trained(name: str) -> tuple[nn.Module, Tensor]:
    """Return a network whose batch norms have seen data, with a negative gamma and a gamma of zero, and a batch."""
    make, shape = NETWORKS[name]
    model, x = make(), torch.randn(6, *shape)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    with torch.no_grad():
        for norm in norms:
            norm.bias.uniform_(-0.5, 0.5)
            norm.weight[0], norm.weight[1] = -0.7, 0.0
        for _ in range(3):
            model.train()(x)
    return model.eval(), x


def quantized(name: str, w_bits: int = 4, a_bits: int = 4, **settings: Any) -> tuple[nn.Module, Tensor]:
    """Quantize one of the networks for integer deployment and calibrate it."""
    model, x = trained(name)
    qmodel = dq.quantize(model, w_bits=w_bits, a_bits=a_bits, **{"deploy": "integer", **settings})
    dq.calibrate(qmodel, [x])
    return qmodel.eval(), x
