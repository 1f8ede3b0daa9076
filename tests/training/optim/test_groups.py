"""Which parameters each optimizer trains, and the course of the learning rate."""

import math

import pytest
import torch
from torch import nn

import daqconvert as dq
from daqconvert.training.optim import lr_factor, parameter_groups


@pytest.mark.parametrize(
    ("step", "options", "expected"),
    [
        (0, {}, 1.0),
        (25, {}, 0.5 * (1 + math.cos(math.pi / 4))),
        (50, {}, 0.5),
        (99, {}, 0.5 * (1 + math.cos(math.pi * 0.99))),
        (100, {}, 0.0),
        (130, {}, 0.0),
        (130, {"schedule": "constant"}, 1.0),
        (0, {"warmup": 4}, 0.2),
        (3, {"warmup": 4}, 0.8),
        (4, {"warmup": 4}, 1.0),
        (52, {"warmup": 4}, 0.5),
        (3, {"warmup": 4, "schedule": "constant"}, 0.8),
        (99, {"warmup": 200}, 100 / 201),
        (25, {"schedule": "linear"}, 0.75),
        (52, {"schedule": "linear", "warmup": 4}, 0.5),
        (3, {"schedule": "linear", "warmup": 4}, 0.8),
        (120, {"schedule": "linear"}, 0.0),
        (29, {"schedule": "step", "fall_steps": 30}, 1.0),
        (30, {"schedule": "step", "fall_steps": 30}, 0.1),
        (95, {"schedule": "step", "fall_steps": 30, "fall": 0.5}, 0.125),
        (1, {"schedule": "step", "fall_steps": 30, "warmup": 3}, 0.5),
    ],
)
def test_schedule(step, options, expected):
    assert lr_factor(step, 100, **options) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("settings", [{}, {"normalize": True}, {"granularity": "tensor"}], ids=str)
def test_every_trainable_parameter_is_in_one_group(make, settings):
    qmodel = make(**settings)
    groups = parameter_groups(qmodel)
    names = [*groups["weights"], *groups["quantizers"]]
    assert sorted(names) == sorted(name for name, p in qmodel.named_parameters() if p.requires_grad)
    ends = ("weight_quantizer.lower", "weight_quantizer.upper", "quantizer.lower", "quantizer.upper", "output_scale")
    assert all(name.endswith(ends) for name in groups["quantizers"])
    assert sorted(groups["weights"]) == sorted(
        name for name, _ in qmodel.named_parameters() if name.endswith((".weight", ".bias"))
    )


def test_an_attribute_that_is_only_called_like_a_quantizers_is_a_weight():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.output_scale = nn.Linear(4, 2), nn.Parameter(torch.ones(()))

        def forward(self, x):
            return self.fc(x) * self.output_scale

    groups = parameter_groups(dq.quantize(Scaled(), w_bits=4, a_bits=4))
    assert "output_scale" in groups["weights"]
    assert "fc.output_scale" in groups["quantizers"]
