"""Freezing: what a frozen model holds, what it refuses to do, and which models cannot be frozen."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import daqconvert as dq
from daqconvert.errors import CalibrationError, ConversionError, FrozenError
from daqconvert.freezing import is_frozen
from daqconvert.layers import FrozenLayer
from daqconvert.models import quantized_sites
from helpers import awkward_models as awkward
from helpers.cases import BY_ID


def quantized(**settings):
    qmodel = dq.quantize(awkward.Residual().eval(), **{"w_bits": 3, "a_bits": 5} | settings)
    dq.calibrate(qmodel, [torch.randn(4, 3, 9, 9)])
    return qmodel


def test_what_a_frozen_model_holds():
    qmodel = quantized()
    state, types = copy.deepcopy(qmodel.state_dict()), [type(m) for m in qmodel.modules()]
    frozen = dq.freeze(qmodel)

    assert type(frozen) is awkward.Residual and is_frozen(frozen) and not is_frozen(qmodel)
    assert [type(m) for m in qmodel.modules()] == types
    assert all(torch.equal(value, state[key]) for key, value in qmodel.state_dict().items())
    assert not any(p.requires_grad for p in frozen.parameters()) and not any(m.training for m in frozen.modules())
    layer = frozen.c1
    assert isinstance(layer, FrozenLayer) and isinstance(layer, nn.Conv2d)
    assert set(layer.state_dict()) == {"weight_codes", "scale", "input_scale", "input_zero_point", "bias"}
    assert layer.weight_codes.dtype == layer.input_zero_point.dtype == torch.uint8
    assert layer.weight_codes.shape == qmodel.c1.weight.shape and int(layer.weight_codes.max()) < 2**3
    assert layer.scale.shape == (4,) and layer.scale.dtype == layer.input_scale.dtype == torch.float32
    assert not any("quantizer" in name or "output_scale" in name for name, _ in frozen.named_parameters())
    assert torch.equal(layer.bias, qmodel.c1.bias) and layer.bias is not qmodel.c1.bias
    assert frozen.c1.settings == qmodel.c1.settings and "frozen" in repr(layer)


def test_batch_norm_is_not_folded():
    qmodel = quantized()
    qmodel.bn.running_mean.fill_(0.5)
    frozen = dq.freeze(qmodel)
    assert type(frozen.bn) is nn.BatchNorm2d and torch.equal(frozen.bn.running_mean, qmodel.bn.running_mean)


def test_the_plan_of_a_frozen_model_is_the_one_it_was_made_with():
    qmodel = quantized()
    assert dq.plan(dq.freeze(qmodel)) == dq.plan(qmodel)
    assert dq.plan(dq.freeze(qmodel))["stem"].signed is True


def test_freezing_the_same_model_twice_gives_the_same():
    qmodel = quantized()
    one, two = dq.freeze(qmodel).state_dict(), dq.freeze(qmodel).state_dict()
    assert one.keys() == two.keys() and all(torch.equal(value, two[key]) for key, value in one.items())


def test_training_the_quantized_model_on_does_not_reach_the_frozen_one():
    qmodel = quantized()
    frozen, x = dq.freeze(qmodel), torch.randn(2, 3, 9, 9)
    before = frozen(x)
    for parameter in qmodel.parameters():
        parameter.data.mul_(1.5)
    qmodel.bn.running_var.mul_(3.0)
    assert torch.equal(frozen(x), before)


def test_freeze_before_calibrate_names_the_layers():
    qmodel = dq.quantize(awkward.Residual())
    with pytest.raises(
        CalibrationError, match=r"4 of 4 layers .*never set: stem, c1, c2, head.*daqconvert\.calibrate"
    ):
        dq.freeze(qmodel)
    many = dq.quantize(nn.Sequential(*[nn.Linear(2, 2) for _ in range(9)]))
    with pytest.raises(CalibrationError, match=r"9 of 9 layers.*: 0, 1, 2, 3, \.\.\."):
        dq.freeze(many)
    weights_only = dq.quantize(awkward.Residual().eval(), a_bits=None, first=(4, None), last=(4, None))
    assert is_frozen(dq.freeze(weights_only))  # nothing to calibrate here


def test_a_float_model_cannot_be_frozen():
    with pytest.raises(ConversionError, match=r"freeze: Residual has no quantized layer.*daqconvert\.quantize"):
        dq.freeze(awkward.Residual())


@pytest.mark.parametrize(
    "verb",
    [
        lambda frozen: dq.freeze(frozen),
        lambda frozen: dq.quantize(frozen),
        lambda frozen: dq.calibrate(frozen, [torch.randn(1, 3, 9, 9)]),
        lambda frozen: dq.load_float(frozen, awkward.Residual().state_dict()),
        lambda frozen: dq.disabled(frozen).__enter__(),
        lambda frozen: frozen.train(),
        lambda frozen: frozen.c1.train(),
    ],
    ids=["freeze", "quantize", "calibrate", "load_float", "disabled", "train", "train-layer"],
)
def test_what_a_frozen_model_refuses(verb):
    frozen, x = dq.freeze(quantized()), torch.randn(2, 3, 9, 9)
    before, state = frozen(x), copy.deepcopy(frozen.state_dict())
    with pytest.raises(FrozenError, match="frozen"):
        verb(frozen)
    frozen.eval()
    assert torch.equal(frozen(x), before)
    assert all(torch.equal(value, state[key]) for key, value in frozen.state_dict().items())


def test_no_forward_in_training_mode_slips_through():
    frozen, x = dq.freeze(quantized()), torch.randn(2, 3, 9, 9)
    statistics = frozen.bn.running_mean.clone()
    with pytest.raises(FrozenError, match=r"stem: a frozen layer .*\.eval\(\)"):
        frozen.train()
    with pytest.raises(FrozenError):
        frozen(x)
    assert torch.equal(frozen.bn.running_mean, statistics)
    frozen.eval()(x)
    assert frozen.train(False) is frozen


def test_a_frozen_layer_inside_a_model_is_found():
    frozen = dq.freeze(quantized())
    with pytest.raises(FrozenError, match=r"quantize: 1\.stem is frozen"):
        dq.quantize(nn.Sequential(nn.Conv2d(3, 3, 1), frozen))


def test_a_half_frozen_model_is_refused():
    part = dq.freeze(quantized())
    with pytest.raises(FrozenError, match="freeze: 1.stem is frozen"):
        dq.freeze(nn.Sequential(quantized(), part))


def test_frozen_models_can_be_saved_and_loaded_as_state_dicts():
    one, two = dq.freeze(quantized()), dq.freeze(quantized())
    x = torch.randn(2, 3, 9, 9)
    assert not torch.equal(one(x), two(x))
    two.load_state_dict(one.state_dict())
    assert torch.equal(one(x), two(x))


def test_codes_cover_the_range_of_the_weights():
    qmodel = dq.quantize(nn.Linear(64, 8), first=(4, None), last=(4, None))
    frozen = dq.freeze(qmodel)
    assert int(frozen.weight_codes.min()) == 0 and int(frozen.weight_codes.max()) == 14  # symmetric: -7 .. 7
    weight = qmodel.weight.detach()
    torch.testing.assert_close(frozen.weight, weight, atol=weight.abs().max().item() / 6, rtol=0.0)


def test_a_model_whose_forward_left_a_graph_behind_can_be_frozen():
    case = BY_ID["caching"]
    qmodel = dq.quantize(case.make())
    dq.calibrate(qmodel, [case.batch()[0]])
    qmodel(*case.batch()).sum().backward()
    assert torch.equal(dq.freeze(qmodel)(*case.batch()), qmodel.eval()(*case.batch()))
    assert len(quantized_sites(qmodel)) == 2
