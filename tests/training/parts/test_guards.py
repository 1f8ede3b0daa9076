"""What goes wrong at low bits is found and warned of once, with advice what to try."""

import json
import logging

import pytest
import torch

import daqconvert as dq
from daqconvert.errors import TrainingError
from daqconvert.training import Recipe
from daqconvert.training.parts.guards import FIRST, LOGGER, Guards
from daqconvert.training.run import Step


def calibrated(make, loader, bits=4):
    model = make(bits, first=(bits, 8), last=(bits, 8), granularity="channel", normalize=bits < 3)
    dq.calibrate(model, loader())
    return model


def guarded(model, **recipe):
    guards = Guards(model, Recipe(**recipe), None, tell=True)
    guards.start()
    return guards


def backward(model, loader):
    model.zero_grad()
    inputs, target = next(iter(loader()))
    torch.nn.functional.cross_entropy(model(inputs), target).backward()


def shrink_input(site):
    site.input_quantizer.upper.data.mul_(0.01)
    site.input_quantizer.lower.data.mul_(0.01)


def close_input(site):
    site.input_quantizer.upper.data.fill_(-0.5)
    site.input_quantizer.lower.data.fill_(0.0)


def shrink_weights(site):
    site.weight_quantizer.upper.data[3] *= 0.01


def put_on_one_level(site):
    site.weight.data.mul_(1e-6)


def kill_scale(site):
    site.output_scale.data[:2] = 0.0


CASES = [
    pytest.param(shrink_input, "input range", ["1 % of its start", "quantizer_lr=0.0001", "freeze_bounds_at=0.5"]),
    pytest.param(close_input, "input range", ["have met (0, -0.5)", "quantizer_lr=0.0001"]),
    pytest.param(shrink_weights, "weight range", ["1 % of its start in 1 of 16 channels", "quantizer_lr=0.0001"]),
    pytest.param(put_on_one_level, "one level", ["100 % of its weights lie on level 7 of 15", 'bits={"4": 6}']),
    pytest.param(
        kill_scale, "dead scale", ["fallen to 0", "in 2 of 16 channels", "quantizer_weight_decay=0 (now 0.1)"]
    ),
]


@pytest.mark.parametrize(("harm", "kind", "told"), CASES)
def test_what_has_collapsed_is_told_once(make, loader, caplog, harm, kind, told):
    model = calibrated(make, loader)
    guards = guarded(model, quantizer_weight_decay=0.1)
    row = {"epoch": 1}
    guards.after_epoch(row)
    assert row["warnings"] == 0
    harm(model[4])
    row = {"epoch": 2}
    with caplog.at_level(logging.WARNING, LOGGER.name):
        guards.after_epoch(row)
        guards.after_epoch({"epoch": 3})
    assert row["warnings"] == len(guards.warnings) == len(caplog.records) == 1
    found = guards.warnings[0]
    assert (found["epoch"], found["layer"], found["kind"]) == (2, "4", kind)
    assert found["text"].startswith("4: ")
    for part in told:
        assert part in found["text"]
    assert caplog.records[0].getMessage() == f"epoch 2: {found['text']}"


def test_a_layer_that_no_gradient_reaches(make, loader):
    model = calibrated(make, loader)
    guards = guarded(model)
    model[1].bias.data.fill_(-100.0)  # behind it the ReLU lets nothing through
    for epoch, number in ((1, 1), (2, 16)):
        backward(model, loader)
        guards.after_step(Step(number, 100, epoch, 1.0))
        guards.after_epoch({"epoch": epoch})
    assert [(w["epoch"], w["layer"], w["kind"]) for w in guards.warnings] == [
        (1, "0", "no gradient"),
        (1, "4", "no gradient"),
    ]


def test_a_healthy_run_is_left_in_peace(make, loader):
    for bits in (1, 2, 4):
        model = calibrated(make, loader, bits)
        guards = guarded(model)
        backward(model, loader)
        guards.after_step(Step(1, 100, 1, 1.0))
        guards.after_epoch({"epoch": 1})
        assert guards.warnings == []


def steps(guards, losses, first=1):
    for number, loss in enumerate(losses, first):
        guards.after_step(Step(number, 1000, 1, loss))


def test_a_loss_that_explodes_stops_the_training(make):
    guards = guarded(make(), explode=5.0, lr=0.2)
    steps(guards, [2.0] * 20)
    steps(guards, [9.9], 21)  # high, but not five times the mean
    with pytest.raises(TrainingError) as error:
        steps(guards, [13.0], 22)
    for part in ("epoch 1, step 22", "the loss is 13", "explodes", "lr=0.02", "clip_grad=1.0", "explode=0", "out_dir"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("losses", "explode"),
    [
        pytest.param([2.0] * 20 + [1e6], 0.0, id="never looks"),
        pytest.param([1.0] * (FIRST - 1) + [50.0], 10.0, id="too early to tell"),
        pytest.param([2.0] * 10 + [1e-4] * 600 + [1.5], 10.0, id="small losses jump, yet not above the start"),
        pytest.param([2.0] * 20 + [float("nan")] * 3 + [2.0], 10.0, id="NaN is another's business"),
        pytest.param([-1.0] * 20 + [5.0], 10.0, id="a loss below 0 has no factor"),
    ],
)
def test_what_is_no_explosion(make, losses, explode):
    guards = guarded(make(), explode=explode)
    steps(guards, losses)


def test_a_resumed_run_knows_where_it_began_and_what_was_told(make, loader, caplog):
    model = calibrated(make, loader)
    guards = guarded(model)
    steps(guards, [2.0, 3.0])
    shrink_input(model[4])
    guards.after_epoch({"epoch": 1})
    kept = {key: value.clone() for key, value in guards.tensors().items()}, json.loads(json.dumps(guards.meta()))

    resumed = guarded(model)
    resumed.load(*kept)
    assert resumed.meta() == guards.meta()
    caplog.clear()
    shrink_input(model[0])
    for each in (guards, resumed):
        steps(each, [1.7])
        each.after_epoch({"epoch": 2})
    assert [w["layer"] for w in resumed.warnings] == ["4", "0"]
    assert resumed.meta() == guards.meta()
    assert len(caplog.records) == 2  # one from each of the two, none of epoch 1 again
