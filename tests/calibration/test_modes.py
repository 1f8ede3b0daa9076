"""`calibrate(mode=)`: the bounds are those of the forward that follows, and observing it changes nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import daqconvert as dq
from daqconvert.calibration.observers import METHODS
from helpers.awkward_models import Routed, new_network


def ranges(model, x, *, train):
    """Return the largest input of each convolution and linear of a float model in one mode."""
    model, found = copy.deepcopy(model), {}
    if not model.training or not train:
        model.train(train)
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_pre_hook(lambda m, args, name=name: found.update({name: float(args[0].max())}))
    with torch.no_grad():
        model(x)
    return found


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", ["eval", "train", "both"])
def test_bounds_are_those_of_the_mode(mode, training):
    model, x = new_network().train(training), torch.rand(8, 3, 6, 6)
    qmodel = dq.quantize(model)
    before = {key: value.clone() for key, value in qmodel.state_dict().items()}
    report = dq.calibrate(qmodel, [x], method="minmax", mode=mode)
    evaluated, trained = ranges(model, x, train=False), ranges(model, x, train=True)
    for row in report.inputs:
        expected = {"eval": evaluated[row.name], "train": trained[row.name]}
        expected["both"] = max(expected.values())
        assert row.upper == pytest.approx(expected[mode], rel=1e-6), row.name
    assert trained["3"] > 10 * evaluated["3"]  # that is what makes the mode matter
    assert report.differing == (("3", "6", "9", "14") if mode == "both" else ())
    if mode == "both":
        assert "4 of 5 inputs have another range in training mode" in str(report) and "train alone [0, " in str(report)
    statistics = {key: value for key, value in before.items() if "running" in key or "num_batches" in key}
    assert len(statistics) == 12 and all(torch.equal(qmodel.state_dict()[k], v) for k, v in statistics.items())
    assert all(module.training == training for module in qmodel.modules())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "settings", [{}, {"rounding": "lsq", "granularity": "tensor"}, {"w_bits": 2, "normalize": True}]
)
def test_where_both_modes_agree_all_give_the_same_bounds(method, settings):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))
    batches = [torch.randn(4, 3, 8, 8) for _ in range(3)]
    model(batches[0])
    states = []
    for mode in ("eval", "train", "both"):
        qmodel = dq.quantize(model, **{"w_bits": 4, "a_bits": 4} | settings)
        report = dq.calibrate(qmodel, batches, method=method, mode=mode)
        assert report.differing == ()
        states.append(qmodel.state_dict())
    assert all(torch.equal(state[key], value) for key, value in states[0].items() for state in states[1:])


@pytest.mark.parametrize("mode", ["train", "both"])
def test_batch_norms_that_are_held_use_their_running_statistics(mode):
    model, x = new_network().train(), torch.rand(8, 3, 6, 6)
    for module in model:
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    report = dq.calibrate(dq.quantize(model), [x], method="minmax", mode=mode)
    assert report.differing == ()
    assert {row.name: pytest.approx(row.upper) for row in report.inputs} == ranges(model, x, train=False)


class Stateful(nn.Module):
    """A module with everything that a training forward may change: buffers, attributes, and random numbers."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 8)), nn.Linear(8, 2)
        self.drop, self.norm = nn.Dropout(0.5), nn.BatchNorm1d(8, momentum=None)
        self.register_buffer("ema", torch.zeros(8))
        self.calls, self.cache = 0, torch.zeros(1)
        self.generator = torch.Generator().manual_seed(3)

    def forward(self, x):
        h = self.norm(self.a(x))
        if self.training:
            self.calls += 1
            self.cache += 1
            self.last = h
            self.ema = self.ema.lerp(h.detach().mean(0), 0.1)
            h = h + torch.randn(8, generator=self.generator)
        return self.b(self.drop(h.relu()))


def test_observing_training_changes_nothing_of_the_model_nor_of_the_random_state():
    qmodel, x = dq.quantize(Stateful()), torch.randn(16, 4)
    own = {key: value for key, value in qmodel.state_dict().items() if "quantizer" not in key}
    kept = {key: value.clone() for key, value in own.items()}
    ema, cache, drawn = qmodel.ema, qmodel.cache, qmodel.generator.get_state()
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first = dq.calibrate(qmodel, [x, x], mode="both")
    assert torch.equal(torch.rand(3), expected)
    second = dq.calibrate(qmodel, [x, x], mode="both")
    assert first == second  # the same random numbers act in each calibration
    assert all(torch.equal(kept[key], value) for key, value in own.items())
    assert qmodel.ema is ema and qmodel.cache is cache and cache == 0 and qmodel.calls == 0
    assert not hasattr(qmodel, "last") and torch.equal(qmodel.generator.get_state(), drawn)
    assert first.differing == ("b",)  # dropout doubles what it lets through


@pytest.mark.parametrize("mode", ["train", "both"])
def test_heads_that_only_training_calls_are_observed(mode):
    model, x = Routed(), torch.randn(16, 4)
    for settings in ({}, {"w_bits": 2, "normalize": True, "first": (2, 8), "last": (2, 8)}):
        qmodel = dq.quantize(model, **settings)
        report = dq.calibrate(qmodel, [x], method="minmax", mode=mode)
        assert report.unseen == () and [row.name for row in report.inputs] == ["a", "head", "aux"]
        h = model.a(x).detach()
        assert qmodel.aux.input_quantizer.upper.item() == pytest.approx(float(h.max()))
        assert qmodel.aux.input_quantizer.sign is True
        assert torch.equal(qmodel.aux.output_scale, qmodel.head.output_scale) == (settings == {})


class Detector(nn.Module):
    """A model that needs targets in training mode, as a detector does."""

    def __init__(self):
        super().__init__()
        self.body, self.head = new_network()[:9], nn.Conv2d(8, 2, 1)

    def forward(self, x, targets=None):
        y = self.head(self.body(x))
        if self.training:
            assert targets is not None, "targets are needed"
        return y


def test_a_training_forward_that_fails_leaves_batch_norms_to_observe():
    model, x = Detector(), torch.rand(8, 3, 6, 6)
    qmodel = dq.quantize(model)
    report = dq.calibrate(qmodel, [x, x], method="minmax")
    assert "batch norms alone had training mode" in report.note and "AssertionError in it: targets are" in str(report)
    expected = ranges(nn.Sequential(model.body, model.head), x, train=True)
    assert qmodel.head.input_quantizer.upper.item() == pytest.approx(expected["1"])
    before = copy.deepcopy(qmodel.state_dict())
    with pytest.raises(AssertionError, match="targets are needed") as raised:
        dq.calibrate(qmodel, [x], mode="train")
    assert 'mode="eval"' in raised.value.__notes__[0] and all(module.training for module in qmodel.modules())
    assert all(torch.equal(before[key], value) for key, value in qmodel.state_dict().items())


def test_batches_of_one_image_can_be_observed():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    report = dq.calibrate(dq.quantize(model), [torch.rand(1, 4), torch.rand(4, 4)])
    assert report.note == "" and report.batches == 2


def test_a_new_network_learns_in_a_loop_of_its_own():
    """The default bounds are those that training needs: with those of evaluation mode nothing is learned."""
    torch.manual_seed(0)
    model, x, y = new_network(), torch.rand(16, 3, 6, 6), torch.arange(16) % 2
    losses = {}
    for mode in ("eval", "both"):
        qmodel = dq.quantize(model)
        dq.calibrate(qmodel, [x], mode=mode)
        optimizer = torch.optim.SGD(qmodel.train().parameters(), lr=0.1, momentum=0.9)
        for _ in range(20):
            optimizer.zero_grad()
            loss = F.cross_entropy(qmodel(x), y)
            loss.backward()
            optimizer.step()
        losses[mode] = loss.item()
    assert losses["both"] < 0.3 and losses["eval"] > 0.6


class Silent(nn.Module):
    """Its second layer's input is always zero in evaluation mode, and small in training mode."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x):
        y = torch.relu(self.first(x)) * 0.01
        return self.last(y if self.training else y * 0.0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("settings", [{}, {"rounding": "lsq", "granularity": "tensor"}])
def test_a_mode_in_which_an_input_is_always_zero_asks_for_no_range(method, settings):
    torch.manual_seed(0)
    model, x = Silent(), torch.randn(64, 4)
    both, train = (
        dq.calibrate(dq.quantize(model, **settings), [x], method=method, mode=mode).inputs[1]
        for mode in ("both", "train")
    )
    assert 0.0 < both.upper == train.upper < 0.2 and both.by_mode["eval"] == (0.0, 0.0) and both.differs
    never = dq.calibrate(dq.quantize(model, **settings), [x], method=method, mode="eval").inputs[1]
    assert (never.lower, never.upper) == (0.0, 1.0) and not never.differs
