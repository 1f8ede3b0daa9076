"""`plan` and `quantize`: what they accept, what they refuse, and that deciding and doing agree."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import daqconvert as dq
from daqconvert.errors import ConversionError, PolicyError
from daqconvert.layers.site import QuantizedSite
from daqconvert.models import quantized_sites
from helpers import awkward_models as awkward
from helpers.cases import CASES, SETTINGS

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=list(SETTINGS))
@each_case
def test_what_is_done_is_what_was_planned(case, settings):
    model = case.make()
    plan = dq.plan(model, **settings)
    qmodel = dq.quantize(model, **settings)

    assert {row.name for row in plan.converted} == set(case.converted)
    assert {row.name for row in plan.skipped} == {*case.skipped, *case.products}
    assert set(quantized_sites(qmodel)) == case.modules
    assert str(dq.plan(qmodel)) == str(plan)
    for row in plan.converted:
        layer = qmodel.get_submodule(case.holders.get(row.name, row.name))
        assert layer.settings == row.settings and layer.layer_name == row.name
        assert "auto" not in (row.settings.grid, row.settings.normalize, row.settings.granularity)
        if layer.weight_quantizer is not None:
            assert layer.weight_quantizer.bits == row.settings.w_bits and layer.weight_quantizer.ready
        if layer.input_quantizer is not None:
            assert layer.input_quantizer.bits == row.settings.a_bits
            assert layer.input_quantizer.sign is row.signed is (False if row.name in case.unsigned else None)
    for row in plan.skipped:
        assert row.reason and row.reason in str(plan)
    for name, module in qmodel.named_modules():
        assert not isinstance(module, QuantizedSite) or name in case.modules


def test_first_and_last_get_eight_bits_and_the_rest_what_was_asked():
    plan = dq.plan(awkward.Residual(), w_bits=3, a_bits=2)
    assert [(row.name, row.rule, row.settings.w_bits, row.settings.a_bits) for row in plan] == [
        ("stem", "first", 8, 8),
        ("c1", "default", 3, 2),
        ("c2", "default", 3, 2),
        ("head", "last", 8, 8),
    ]
    plan = dq.plan(awkward.Residual(), w_bits=3, a_bits=2, first=None, last=(4, None))
    assert not plan["stem"].converted and plan["head"].settings.w_bits == 4 and plan["head"].settings.a_bits is None


@pytest.mark.parametrize("bits", [0, 9, 2.5, -1, True, "4", 64, float("nan")], ids=repr)
@pytest.mark.parametrize("key", ["w_bits", "a_bits"])
def test_impossible_widths(key, bits):
    model = awkward.Chain()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PolicyError, match=f"{key}: expected an integer from 1 to 8, or None .32."):
        dq.quantize(model, **{key: bits})
    with pytest.raises(PolicyError, match="from 1 to 8"):
        dq.plan(model, first=(bits, 4))
    assert all(torch.equal(value, before[k]) for k, value in model.state_dict().items())


@pytest.mark.parametrize("bits", [None, 32])
def test_thirty_two_bits_mean_float(bits):
    qmodel = dq.quantize(awkward.Chain(), w_bits=4, a_bits=bits)
    assert qmodel[3].input_quantizer is None and dq.plan(qmodel)["3"].settings.a_bits is None
    with pytest.raises(ConversionError, match="nothing to quantize: 3 convolutions and linears found, all left alone"):
        dq.quantize(awkward.Chain(), w_bits=bits, a_bits=bits, first=None, last=None)


def test_unknown_names():
    with pytest.raises(PolicyError, match=r'"layer9\.\*" matches no layer'):
        dq.quantize(awkward.Chain(), rules=[dq.Rule({"w_bits": 2}, match="layer9.*")])
    with pytest.raises(PolicyError, match=r"'w_bit' is not a setting.*Nearest: w_bits"):
        dq.quantize(awkward.Chain(), w_bit=4)
    with pytest.raises(PolicyError, match="paper-w1a1"):
        dq.quantize(awkward.Chain(), preset="paper-w1a9")
    with pytest.raises(PolicyError, match="matches no layer"):
        dq.quantize(awkward.Chain(), exclude=["fc"])


def test_a_rule_cannot_reach_what_cannot_be_converted():
    with pytest.raises(PolicyError, match="recurrent layer"):
        dq.quantize(awkward.Recurrent(), rules=[dq.Rule({"w_bits": 2}, match="rnn")])


@pytest.mark.parametrize(
    "model",
    [nn.Sequential(nn.ReLU()), nn.Identity(), nn.LSTM(3, 3), nn.Bilinear(2, 2, 2)],
    ids=lambda model: type(model).__name__,
)
def test_nothing_to_quantize(model):
    with pytest.raises(ConversionError, match=rf"{type(model).__name__}: nothing to quantize.*daqconvert\.plan"):
        dq.quantize(model)


def test_quantizing_twice_is_refused():
    qmodel = dq.quantize(awkward.Chain())
    with pytest.raises(ConversionError, match=r"quantize: 0 is quantized already .*original float model"):
        dq.quantize(qmodel)
    with pytest.raises(ConversionError, match=r"quantize: 1\.0 is quantized already"):
        dq.quantize(nn.Sequential(nn.Linear(2, 2), qmodel))


def test_using_bounds_that_were_never_set_is_refused_by_name():
    qmodel = dq.quantize(awkward.Chain())
    with pytest.raises(
        dq.DaqError, match=r"0: the bounds of its input quantizer were never set.*daqconvert\.calibrate"
    ):
        qmodel(torch.randn(1, 3, 9, 9))


def test_lazy_layers_are_planned_and_left_alone():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.LazyLinear(2))
    qmodel = dq.quantize(model)
    assert "lazy" in dq.plan(qmodel)["2"].reason
    dq.calibrate(qmodel, [torch.randn(3, 4)])
    assert qmodel(torch.randn(3, 4)).shape == (3, 2)


@each_case
def test_the_plan_counts_bytes_as_they_are(case):
    model = case.make()
    plan = dq.plan(model, w_bits=4, a_bits=4, example_inputs=case.batch())
    state = sum(t.numel() for t in (*model.parameters(), *model.buffers()))
    twice = model.b.weight.numel() if case.id == "tied" else 0
    assert plan.float_bytes == 4 * (state + twice)
    expected = 4 * (state + twice)
    for row in plan.converted:
        weights = math.prod(row.site.weight_shape)
        expected -= 4 * weights - row.settings.w_bits * math.ceil(weights / 8)
    assert plan.bytes == expected
    assert plan.macs is not None and all(row.site.macs for row in plan.converted)
    assert plan.input_size is not None


def test_macs_of_what_a_fused_kernel_computes():
    plan = dq.plan(awkward.Attention(), example_inputs=torch.zeros(1, 3, 8))
    macs = {row.name: row.site.macs for row in plan}
    assert macs == {
        "a": 3 * 64, **{f"attn.{x}_proj": 3 * 64 for x in "qkv"}, "attn.attention_scores": 9 * 8,
        "attn.attention_values": 9 * 8, "attn.out_proj": 3 * 64, "b": 3 * 16,
    }  # fmt: skip


def test_plan_of_a_model_on_the_meta_device():
    with torch.device("meta"):
        model = awkward.Residual()
    plan = dq.plan(model, example_inputs=torch.zeros(1, 3, 9, 9))
    assert len(plan.converted) == 4 and plan.macs == 81 * 4 * 27 + 81 * 4 * 36 + 81 * 16 + 12


def test_a_part_of_a_quantized_model_is_not_quantized_again():
    qmodel = dq.quantize(nn.Sequential(awkward.Chain(), nn.Linear(5, 2)))
    with pytest.raises(ConversionError, match="quantized already"):
        dq.quantize(qmodel[0])


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_every_module_stays(training):
    model = awkward.Residual().train(training)
    model.bn.train(not training)
    qmodel = dq.quantize(model)
    assert qmodel.training is training and qmodel.bn.training is not training
    assert qmodel.c1.weight_quantizer.training is qmodel.c1.input_quantizer.training is training


@pytest.mark.parametrize(
    "asked", [{"w_bits": 2}, {"first": None}, {"preset": "paper-w1a1"}, {"exclude": ["0"]}], ids=str
)
def test_the_plan_of_a_quantized_model_cannot_be_asked_to_be_another(asked):
    qmodel = dq.quantize(awkward.Chain(), w_bits=4)
    with pytest.raises(ConversionError, match=f"plan: Chain is quantized already .*found {next(iter(asked))}"):
        dq.plan(qmodel, **asked)
    assert dq.plan(qmodel)["3"].settings.w_bits == 4


class Frozen(nn.Module):
    """Layers, a bare parameter, a computed weight and products of activations, of which some are frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (
            nn.Linear(6, 6),
            nn.Linear(6, 6),
            nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)),
        )
        self.own, self.other = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(6, 6))
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x):
        x = self.c(torch.relu(self.b(torch.relu(self.a(x))))) @ self.own
        x = torch.nn.functional.linear(x, self.other)
        return self.attention(x, x, x)[0]


def unfrozen(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("settings", [{}, {"rounding": "lsq", "grid": "twos"}], ids=["default", "lsq"])
def test_bounds_of_a_layer_that_was_frozen_before_are_not_trained(settings):
    model, x = Frozen(), torch.randn(4, 5, 6)
    for part in (model.a, model.c, model.attention):
        part.requires_grad_(False)
    model.other.requires_grad = False
    qmodel = dq.quantize(model, attention=8, **settings)
    before = unfrozen(qmodel)
    trained = {name.split(".")[0] for name in before}
    assert trained == {"b", "own", *(name for name in trained if name.startswith("own"))}, before
    assert any(name.startswith("b.input_quantizer.") for name in before)
    assert any(name.startswith("own") and "_quantizer." in name for name in before)
    dq.calibrate(qmodel, [x])
    assert unfrozen(qmodel) == before
    other = dq.quantize(model, attention=8, **settings)
    other.load_state_dict(qmodel.state_dict())
    assert unfrozen(other) == before


@pytest.mark.parametrize("whole", [False, True], ids=["one layer", "the model"])
def test_nothing_thaws_what_was_frozen_after_quantize(whole):
    qmodel, x = dq.quantize(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))), torch.randn(32, 4)
    signed = dq.quantize(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
    dq.calibrate(signed, [x])
    (qmodel if whole else qmodel[0]).requires_grad_(False)
    before = unfrozen(qmodel)
    assert not any(name.startswith("0.") for name in before) and (not before) is whole
    dq.calibrate(qmodel, [x])
    assert unfrozen(qmodel) == before and qmodel[0].input_quantizer.sign is True
    qmodel.load_state_dict(signed.state_dict())
    assert unfrozen(qmodel) == before
    dq.load_float(qmodel, nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).state_dict())
    assert unfrozen(qmodel) == before


def test_an_input_quantizer_that_a_trained_layer_shares_is_trained():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.end = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.end(self.one(x) + self.two(x))

    model = Two()
    model.one.requires_grad_(False)
    qmodel = dq.quantize(model, share_inputs=True)
    assert qmodel.one.input_quantizer is qmodel.two.input_quantizer
    assert all(p.requires_grad for p in qmodel.two.parameters())
    assert not any(p.requires_grad for p in qmodel.one.weight_quantizer.parameters())


@pytest.mark.parametrize(
    "settings", [{"rounding": "lsq", "grid": "twos"}, {"deploy": "integer"}], ids=["lsq", "integer"]
)
def test_a_model_that_was_made_on_the_meta_device_is_whole_after_load_float(settings):
    def make():
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(100, 2)).eval()

    real, x = make(), torch.randn(4, 3, 9, 9)
    with torch.device("meta"):
        empty = make()
    found, expected = (dq.quantize(model, **settings) for model in (empty, real))
    dq.load_float(found, real.state_dict())
    for qmodel in (found, expected):
        dq.calibrate(qmodel, [x])
    assert not any(t.is_meta for t in (*found.parameters(), *found.buffers()))
    assert torch.equal(found.eval()(x), expected.eval()(x))
