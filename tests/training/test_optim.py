import math

import pytest
import torch
from torch import nn

import daqconvert as dq
from daqconvert.errors import TrainingError
from daqconvert.training import Recipe
from daqconvert.training.optim import Optimizers, lr_factor, parameter_groups


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
    ],
)
def test_schedule(step, options, expected):
    assert lr_factor(step, 100, **options) == pytest.approx(expected, abs=1e-12)


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


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


def test_groups_have_their_optimizers_and_decay(make):
    optimizers = Optimizers(make(), Recipe(lr=0.1, quantizer_lr=0.01, weight_decay=0.5, momentum=0.8), 10)
    sgd, adam = optimizers.optimizers["weights"], optimizers.optimizers["quantizers"]
    assert isinstance(sgd, torch.optim.SGD)
    assert isinstance(adam, torch.optim.Adam)
    assert [(g["weight_decay"], g["momentum"]) for g in sgd.param_groups] == [(0.5, 0.8)]
    assert [g["weight_decay"] for g in adam.param_groups] == [0.0]
    assert optimizers.set_step(5) == {"weights": pytest.approx(0.05), "quantizers": pytest.approx(0.005)}
    assert (sgd.param_groups[0]["lr"], adam.param_groups[0]["lr"]) == (pytest.approx(0.05), pytest.approx(0.005))


def test_decay_of_weights_leaves_out_biases_and_norms(make):
    optimizers = Optimizers(make(), Recipe(decay="weights", weight_decay=0.5), 10)
    decayed, rest = optimizers.optimizers["weights"].param_groups
    assert (decayed["weight_decay"], {p.dim() for p in decayed["params"]}) == (0.5, {2})
    assert (rest["weight_decay"], {p.dim() for p in rest["params"]}) == (0.0, {1})


def test_frozen_parameters_are_left_out(make):
    qmodel = make()
    qmodel[0].requires_grad_(False)
    assert not any(name.startswith("0.") for named in parameter_groups(qmodel).values() for name in named)
    with pytest.raises(TrainingError, match="requires_grad_"):
        Optimizers(qmodel.requires_grad_(False), Recipe(), 10)


def steps(qmodel, optimizers, count):
    for step in range(count):
        torch.manual_seed(step)
        optimizers.set_step(step)
        optimizers.zero_grad()
        qmodel(torch.randn(8, 8)).square().mean().backward()
        optimizers.step()


def test_state_moves_to_a_new_pair(make):
    a = make()
    dq.calibrate(a, [torch.randn(8, 8)])
    b = make()
    first = Optimizers(a, Recipe(), 10)
    steps(a, first, 3)
    b.load_state_dict(a.state_dict())
    second = Optimizers(b, Recipe(), 10)
    state = first.state_dict()
    assert {key.split("/")[1] for key in state} == {"momentum_buffer", "exp_avg", "exp_avg_sq", "step"}
    second.load_state_dict({key: value.clone() for key, value in state.items()})
    steps(a, first, 3)
    steps(b, second, 3)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    second.load_state_dict({})
    assert second.state_dict() == {}


@pytest.mark.parametrize(
    ("key", "shape"),
    [("weights/momentum_buffer/0.nothing", (16, 8)), ("weights/momentum_buffer/0.weight", (8, 16)), ("x", ())],
)
def test_state_that_fits_no_parameter_is_refused(make, key, shape):
    with pytest.raises(TrainingError, match="fits no parameter"):
        Optimizers(make(), Recipe(), 10).load_state_dict({key: torch.zeros(shape)})
