"""Small networks of blocks, and how tests quantize and reconstruct them."""

import torch
from torch import nn

import daqconvert as dq
from daqconvert.models import float_copy
from daqconvert.posttraining import block_names, reconstruct


def images(count=48, size=12, seed=0):
    x = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))
    return x + x.roll(1, 2) + x.roll(1, 3)  # neighbours are alike, as in a photo


class Block(nn.Module):
    """A residual block whose first operation is in place, as in some networks."""

    def __init__(self, width, inplace=False):
        super().__init__()
        self.inplace = inplace
        self.one, self.norm = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.two = nn.Conv2d(width, width, 1)

    def forward(self, x):
        x = x.mul_(0.9) if self.inplace else x * 0.9
        return x + self.two(torch.relu(self.norm(self.one(x))))


class Net(nn.Module):
    """A sequence of blocks; `detour` puts an operation without effect between them."""

    def __init__(self, inplace=False, detour=False):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.detour = nn.Conv2d(3, 8, 3), detour
        self.blocks = nn.ModuleList(Block(8, inplace) for _ in range(3))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x.clone() if self.detour else x)
        return self.head(x.mean(dim=(2, 3)))


def trained_norms(model, x):
    """Give the batch norms the statistics of the network's own data, as after training."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        model.train()(x)
    return model.eval()


def low(model, x, **settings):
    qmodel = dq.quantize(model, **{"w_bits": 2, "a_bits": 4, **settings})
    dq.calibrate(qmodel, [x], progress=False)
    return qmodel


def error(qmodel, model, x):
    with torch.no_grad():
        return float((qmodel.eval()(x) - model(x)).square().mean() / model(x).square().mean())


def rebuilt(model, x, steps=60, batch=16, **settings):
    qmodel = low(model, x, **settings)
    names = block_names(qmodel)
    return qmodel, reconstruct(qmodel, float_copy(qmodel), list(x.split(batch)), names, steps, show=False)


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.twice = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
        self.pair = Pair()
        self.tied = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
        self.never = nn.Linear(6, 6)
        self.last = nn.Linear(6, 6)
        self.last.weight = self.tied[2].weight

    def forward(self, x):
        return self.last(self.tied(sum(self.pair(self.twice(self.twice(self.first(x)))))))


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.one(x), self.two(x)
