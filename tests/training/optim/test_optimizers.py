"""Optimizers by name, their decay and steps, and their state as flat tensors."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import daqconvert as dq
from daqconvert.errors import TrainingError
from daqconvert.training import Recipe
from daqconvert.training.optim import Optimizers, parameter_groups
from daqconvert.training.optim.optimizers import check_optimizer


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


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


def test_steps_fall_by_epochs(make):
    optimizers = Optimizers(make(), Recipe(lr=1.0, epochs=5, schedule="step", step_epochs=2, step_factor=0.5), 50)
    assert [optimizers.set_step(step)["weights"] for step in (0, 19, 20, 39, 40)] == [1.0, 1.0, 0.5, 0.5, 0.25]


def test_a_schedule_that_ends_needs_a_length(make):
    with pytest.raises(TrainingError, match='has no length.*schedule="constant"'):
        Optimizers(make(), Recipe(schedule="linear"), 0)
    assert Optimizers(make(), Recipe(schedule="constant", lr=0.5), 0).set_step(7)["weights"] == 0.5


def test_no_decay_is_names_and_patterns_in_both_groups(make):
    recipe = Recipe(
        weight_decay=0.5, quantizer_weight_decay=0.25, no_decay=("4.weight", "*.bias", r"re:\d\.output_scale")
    )
    qmodel = make()
    optimizers = Optimizers(qmodel, recipe, 10)
    names = {id(p): name for name, p in qmodel.named_parameters()}
    decay = {
        names[id(p)]: group["weight_decay"]
        for optimizer in optimizers.optimizers.values()
        for group in optimizer.param_groups
        for p in group["params"]
    }
    spared = {name for name, amount in decay.items() if amount == 0.0}
    assert spared == {name for name in decay if name.endswith((".bias", ".output_scale"))} | {"4.weight"}
    assert decay["0.weight"] == 0.5
    assert decay["4.input_quantizer.upper"] == 0.25


@pytest.mark.parametrize(
    ("pattern", "told"),
    [("4.wieght", "matches no parameter. Nearest: 4.weight"), ("re:(", "no regular expression"), ("x*", "no_decay")],
)
def test_no_decay_that_means_nothing_is_an_error(make, pattern, told):
    with pytest.raises(TrainingError, match=told):
        Optimizers(make(), Recipe(no_decay=(pattern,)), 10)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("adamv", "no optimizer of timm's factory.*Nearest: .*adam"),
        ("adahessian", "'adahessian' cannot be used: a step with nothing but gradients failed"),
        ("kron", "state 'Q' is a list"),
    ],
)
def test_optimizers_that_cannot_be(make, name, told):
    with pytest.raises(TrainingError, match=told):
        Optimizers(make(), Recipe(optimizer=name), 10)
    with pytest.raises(TrainingError, match=f"quantizer_optimizer: {name!r}"):
        Optimizers(make(), Recipe(quantizer_optimizer=name), 10)


def test_checking_an_optimizer_draws_nothing():
    check_optimizer.__globals__["_problem"].cache_clear()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    check_optimizer("lamb", "optimizer")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("sgd", lambda p: torch.optim.SGD(p, 0.1, momentum=0.8, weight_decay=0.01)),
        ("nesterov", lambda p: torch.optim.SGD(p, 0.1, momentum=0.8, weight_decay=0.01, nesterov=True)),
        ("adam", lambda p: torch.optim.Adam(p, 0.1, weight_decay=0.01)),
        ("adamw", lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.01)),
    ],
)
def test_names_mean_what_they_mean_in_torch(name, plain):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    twin = copy.deepcopy(model)
    recipe = Recipe(optimizer=name, lr=0.1, momentum=0.8, weight_decay=0.01, schedule="constant")
    ours, theirs = Optimizers(model, recipe, 10), plain(twin.parameters())
    for step in range(4):
        x = torch.randn(5, 4)
        ours.set_step(step)
        for net, optimizer in ((model, ours), (twin, theirs)):
            optimizer.zero_grad()
            net(x).square().sum().backward()
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


ROUND_TRIPS = ["sgd", "nesterov", "adam", "adamw", "lamb", "lion", "adan", "novograd", "nadamlegacy", "cadafactor",
               "laprop", "adafactorbv", "muon", "rmsprop"]  # fmt: skip


@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_state_goes_through_a_file_bit_for_bit(make, name, tmp_path):
    recipe = Recipe(optimizer=name, quantizer_optimizer=name, lr=0.01, weight_decay=0.1, schedule="constant")
    a, b = make(), make()
    dq.calibrate(a, [torch.randn(8, 8)])
    first = Optimizers(a, recipe, 10)
    steps(a, first, 3)
    state = first.state_dict()
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    save_file({key: value.clone().contiguous() for key, value in state.items()}, tmp_path / "state")
    b.load_state_dict(a.state_dict())
    second = Optimizers(b, recipe, 10)
    second.load_state_dict(load_file(tmp_path / "state"))
    again = second.state_dict()
    assert {k: v.dtype for k, v in again.items()} == {k: v.dtype for k, v in state.items()}
    steps(a, first, 3)
    steps(b, second, 3)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_a_resting_group_does_not_move(make):
    qmodel = make()
    dq.calibrate(qmodel, [torch.randn(8, 8)])
    optimizers = Optimizers(qmodel, Recipe(quantizer_weight_decay=0.1), 10)
    steps(qmodel, optimizers, 2)
    optimizers.resting.add("quantizers")
    before = {name: p.detach().clone() for name, p in qmodel.named_parameters()}
    steps(qmodel, optimizers, 2)
    moved = {name for name, p in qmodel.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(optimizers.named["weights"])
    assert {id(p) for p in optimizers.parameters} == {id(p) for p in optimizers.named["weights"].values()}
    optimizers.resting.clear()
    steps(qmodel, optimizers, 1)
    assert not torch.equal(qmodel[4].output_scale, before["4.output_scale"])
