"""Which values are proven not to be negative: each proof is held against what the function computes."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from daqconvert.graph import find_sites

PROVEN = {
    "relu": lambda x: x.relu(),
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "hardsigmoid": F.hardsigmoid,
    "softmax": lambda x: x.softmax(-1),
    "abs": abs,
    "clamp": lambda x: x.clamp(0, 6),
    "clamp-above": lambda x: F.relu(x).clamp(max=3),
    "max-pool": lambda x: F.max_pool2d(F.relu(x), 2),
    "avg-pool": lambda x: F.adaptive_avg_pool2d(F.relu(x), 1),
    "cat": lambda x: torch.cat([F.relu(x), torch.sigmoid(x)], dim=1)[:, :4],
    "cat-keyword": lambda x: torch.cat(tensors=[F.relu(x), x.abs()], dim=1)[:, :4],
    "views": lambda x: F.relu(x).flatten(2).transpose(1, 2).permute(0, 2, 1).reshape(1, 4, 8, 8).contiguous(),
    "dropout": lambda x: F.dropout(F.relu(x), training=False),
    "gate": lambda x: F.relu(x) * torch.sigmoid(x),
    "scaled": lambda x: F.relu(x) * 0.5 + 1,
    "chunk": lambda x: F.relu(torch.cat([x, x], 1)).chunk(2, dim=1)[1],
    "pad": lambda x: F.pad(F.relu(x), (1, 1)),
    "interpolate": lambda x: F.interpolate(F.relu(x), scale_factor=2, mode="bilinear"),
}


NOT_PROVEN = {
    "input": lambda x: x,
    "gelu": F.gelu,
    "silu": F.silu,
    "leaky": lambda x: F.leaky_relu(x),
    "tanh": torch.tanh,
    "minus": lambda x: F.relu(x) - F.relu(-x),
    "rsub": lambda x: 1 - F.relu(x),
    "negative-factor": lambda x: F.relu(x) * -0.5,
    "negative-shift": lambda x: F.relu(x) + -1,
    "alpha": lambda x: torch.add(F.relu(x), F.relu(-x), alpha=-1),
    "alpha-method": lambda x: F.relu(x).add(F.relu(-x), alpha=-2),
    "other": lambda x: torch.add(F.relu(x), other=x),
    "cat-one-side": lambda x: torch.cat([F.relu(x), x], dim=1)[:, 4:],
    "cat-keyword": lambda x: torch.cat(tensors=[F.relu(x), x], dim=1)[:, 4:],
    "clamp-below": lambda x: x.clamp(min=-1),
    "clamp-max": lambda x: x.clamp(max=1),
    "clamp-to-negative": lambda x: F.relu(x).clamp(-2, -1),
    "hardtanh": F.hardtanh,
    "bicubic": lambda x: F.interpolate(F.relu(x), scale_factor=2, mode="bicubic"),
    "negative-pad": lambda x: F.pad(F.relu(x), (1, 1), value=-1.0),
    "add-nothing": lambda x: torch.add(x, 0),
    "layer-norm": lambda x: F.layer_norm(F.relu(x), (8,)),
    "in-place": lambda x: (h := F.relu(x), h.sub_(1), h)[-1],
    "in-place-view": lambda x: (h := F.relu(x), h.view(-1).neg_(), h)[-1],
}


class Before(nn.Module):
    """A function, and the convolution whose input it makes."""

    def __init__(self, function):
        super().__init__()
        self.function, self.conv = function, nn.Conv2d(4, 2, 1)

    def forward(self, x):
        return self.conv(self.function(x))


@pytest.mark.parametrize("name", PROVEN)
def test_proven(name):
    model = Before(PROVEN[name])
    assert find_sites(model).sites[0].nonnegative
    assert PROVEN[name](torch.randn(1, 4, 8, 8) * 3).min() >= 0  # and it is true


@pytest.mark.parametrize("name", NOT_PROVEN)
def test_not_proven(name):
    model = Before(NOT_PROVEN[name])
    assert not find_sites(model).sites[0].nonnegative
    assert NOT_PROVEN[name](torch.randn(1, 4, 8, 8) * 3).min() < 0  # rightly so


def test_a_class_or_function_of_the_user_with_a_known_name_proves_nothing():
    class ReLU(nn.Module):
        def forward(self, x):
            return x - x.mean() if x.sum() > 0 else x

    model = nn.Sequential(nn.Linear(4, 4), ReLU(), nn.Linear(4, 2))
    assert not any(site.nonnegative for site in find_sites(model).sites)
