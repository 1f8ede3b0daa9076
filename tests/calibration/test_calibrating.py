"""`calibrate`: bounds from data in one pass, four methods, signs decided once, output scales from the first batch.

The second half is about refusals: a model that cannot be calibrated is not changed, and the error says why.
"""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import daqconvert as dq
from daqconvert.calibration import is_calibrated
from daqconvert.calibration.observers import METHODS
from daqconvert.errors import CalibrationError, ConversionError, DataError, FrozenError
from daqconvert.models import quantized_sites
from daqconvert.posttraining.gptq import choose_codes
from helpers import awkward_models as awkward

# ------------------------------------------------------------------------------------------------- the verb


def chain(**settings):
    return dq.quantize(awkward.Chain().eval(), **{"w_bits": 4, "a_bits": 4} | settings)


def snapshot(model):
    """Return everything that a refused call must not change."""
    modules = list(model.modules())
    return (
        {key: value.clone() for key, value in model.state_dict().items()},
        [(getattr(m, "sign", None), getattr(m, "ready", None), m.training) for m in modules],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules],
        [p.requires_grad for p in model.parameters()],
    )


def unchanged(model, before):
    (state, *rest), (now, *rest_now) = before, snapshot(model)
    return rest == rest_now and all(torch.equal(value, state[key]) for key, value in now.items())


@pytest.mark.parametrize("method", METHODS)
def test_one_pass_over_a_generator(method):
    qmodel, read = chain(), []

    def batches():
        for i in range(4):
            read.append(i)
            yield torch.randn(2, 3, 9, 9), torch.zeros(2)

    report = dq.calibrate(qmodel, batches(), method=method)

    assert read == [0, 1, 2, 3] and report.batches == 4 and report.method == method
    assert [row.name for row in report.inputs] == ["0", "3", "7"] and report.unseen == ()
    assert [(row.signed, row.proven) for row in report.inputs] == [(True, False), (False, True), (False, True)]
    assert is_calibrated(qmodel)
    for row in report.inputs:
        quantizer = qmodel.get_submodule(row.name).input_quantizer
        assert quantizer.lower.item() == pytest.approx(row.lower) and quantizer.upper.item() == pytest.approx(
            row.upper
        )
        assert row.name in str(report) and f"{row.upper:.4g}" in str(report)


def test_no_more_than_max_batches_are_read():
    read = []

    def batches():
        while True:
            read.append(0)
            yield torch.randn(2, 3, 9, 9)

    assert dq.calibrate(chain(), batches(), max_batches=3).batches == 3 and len(read) == 3


ROWS = torch.randn(2, 4)
BATCHES = {
    "tensor": ROWS,
    "tuple": (ROWS, 0),
    "list": [ROWS],
    "dict": {"x": ROWS},
    "labels": {"x": ROWS, "labels": torch.zeros(2)},
}


@pytest.mark.parametrize("batch", BATCHES.values(), ids=list(BATCHES))
def test_every_kind_of_batch(batch):
    dq.calibrate(dq.quantize(awkward.Optional()), [batch])


def test_inputs_are_observed_in_the_float_model_and_the_rest_stays():
    model = awkward.Chain().train()
    qmodel = dq.quantize(model, w_bits=1, a_bits=4, first=(1, 4), last=(1, 4))
    images = torch.randn(8, 3, 9, 9)
    seen = []
    model[3].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        copy.deepcopy(model).eval()(images)
    report = dq.calibrate(qmodel, [images], method="minmax", mode="eval")
    assert report.inputs[1].upper == pytest.approx(float(seen[0].max()))
    assert all(module.training for module in qmodel.modules())
    for key, value in model.state_dict().items():  # weights and the statistics of batch norm
        assert torch.equal(qmodel.state_dict()[key], value)
    assert all(p.grad is None for p in qmodel.parameters())


def test_the_sign_is_decided_once():
    qmodel = dq.quantize(nn.Linear(4, 2))
    assert qmodel.input_quantizer.sign is None and dq.plan(qmodel)[""].signed is None
    first = dq.calibrate(qmodel, [torch.rand(5, 4)])
    assert not first.inputs[0].signed and dq.plan(qmodel)[""].signed is False
    assert "unsigned (from data)" in str(first)
    second = dq.calibrate(qmodel, [torch.randn(5, 4)])
    assert not second.inputs[0].signed and not second.inputs[0].proven
    assert "negative values are clipped" in str(second)


def test_an_undecided_sign_is_shown_once_decided():
    qmodel = chain()
    assert "(calibrate decides)" in str(dq.plan(qmodel))
    dq.calibrate(qmodel, [torch.randn(2, 3, 9, 9)])
    assert dq.plan(qmodel)["0"].signed is True and "(calibrate decides)" not in str(dq.plan(qmodel))


def test_calibrating_again_with_the_same_data_changes_nothing():
    qmodel, images = chain(w_bits=2), torch.randn(4, 3, 9, 9)
    dq.calibrate(qmodel, [images])
    before = snapshot(qmodel)
    dq.calibrate(qmodel, [images])
    assert unchanged(qmodel, before)


def test_output_scales_start_as_in_the_paper():
    settings = {"w_bits": 2, "normalize": True, "granularity": "channel", "first": (2, 4), "last": (2, 4)}
    qmodel, images = chain(**settings), torch.randn(16, 3, 9, 9)
    dq.calibrate(qmodel, [images, torch.randn(16, 3, 9, 9) * 9], mode="eval")
    qmodel.eval()
    for name, x in (("0", images), ("3", nn.Sequential(*list(qmodel)[:3])(images))):
        layer = qmodel.get_submodule(name)
        exact = F.conv2d(x, layer.weight, None, layer.stride, layer.padding)
        quantized = layer(x) - (0 if layer.bias is None else layer.bias[:, None, None])
        ratio = exact.abs().mean((0, 2, 3)) / quantized.abs().mean((0, 2, 3))
        torch.testing.assert_close(ratio, torch.ones(8), rtol=1e-4, atol=0.0)
        assert not torch.equal(layer.output_scale, torch.ones(8))


def test_output_scales_are_one_where_the_grid_carries_units():
    qmodel = chain()
    qmodel[3].output_scale.data.fill_(7.0)
    dq.calibrate(qmodel, [torch.randn(2, 3, 9, 9)])
    assert torch.equal(qmodel[3].output_scale, torch.ones(8))


def test_a_layer_called_twice_gets_one_scale_from_both_calls():
    model = awkward.CalledTwice().eval()
    qmodel = dq.quantize(model, w_bits=2, a_bits=8, first=None, last=None, granularity="tensor")
    x = torch.randn(64, 4)
    dq.calibrate(qmodel, [x])
    layer = qmodel.mid
    one = torch.relu(model.a(x))
    two = layer(one)
    exact = sum(F.linear(v, layer.weight).abs().mean() for v in (one, two))
    quantized = sum((layer(v) - layer.bias).abs().mean() for v in (one, two))
    assert (exact / quantized).item() == pytest.approx(1.0, rel=0.1)


def test_a_channel_that_is_dead_on_the_first_batch_is_not_lost():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4, bias=False))
    for kind in ("channel", "tensor"):
        qmodel = dq.quantize(
            model, first={"w_bits": 2, "a_bits": 8, "granularity": kind}, last={"w_bits": 2, "a_bits": 8}
        )
        dead = torch.rand(8, 4, 6, 6)
        dead[:, 1] = 0.0
        dq.calibrate(qmodel, [dead, torch.rand(8, 4, 6, 6)])
        x = torch.rand(8, 4, 6, 6)
        relative = (qmodel(x) - model(x)).square().mean((0, 2, 3)) / model(x).square().mean((0, 2, 3))
        assert relative[1] < 1.0, kind
        qmodel(x).square().sum().backward()
        assert (qmodel[0].output_scale.grad != 0).all()


@pytest.mark.parametrize("w_bits", [2, 8])
def test_a_layer_that_no_batch_reaches(w_bits):
    qmodel = dq.quantize(awkward.Routed(), w_bits=w_bits, a_bits=8, first=(w_bits, 8), last=(w_bits, 8))
    report = dq.calibrate(qmodel, [torch.randn(4, 4)], mode="eval")
    assert report.unseen == ("aux",) and "aux: not reached by any batch" in str(report)
    assert qmodel.aux.input_quantizer.sign is None
    out = qmodel.train()(torch.randn(4, 4))[1]
    assert out.isfinite().all() and out.std() > 0  # not everything below zero was clipped
    frozen = dq.freeze(qmodel)
    assert torch.equal(frozen(torch.ones(1, 4)), qmodel.eval()(torch.ones(1, 4)))
    before = qmodel.aux.input_quantizer.upper.clone()
    qmodel.aux.input_quantizer.upper.data.mul_(2)
    dq.calibrate(qmodel, [torch.randn(4, 4)], mode="eval")
    assert qmodel.aux.input_quantizer.upper == 2 * before  # what was trained since is kept


class Boxes(nn.Module):
    """A model with a box head: it computes for the rows whose mean is above 1/2, which may be none."""

    def __init__(self):
        super().__init__()
        self.body, self.norm, self.head, self.last = (
            nn.Linear(4, 8),
            nn.BatchNorm1d(8),
            nn.Linear(8, 8),
            nn.Linear(8, 2),
        )

    def forward(self, x):
        h = self.norm(self.body(x)).relu()
        return self.last(self.head(h[x.mean(1) > 0.5]).relu())


WIDTHS = {
    "w1a4": {"w_bits": 1, "a_bits": 4},
    "w2a32": {"w_bits": 2, "a_bits": None},
    "w1a2-channel": {"w_bits": 1, "a_bits": 2, "granularity": "channel"},
    "w4a4": {"w_bits": 4, "a_bits": 4},
    "lsq": {"w_bits": 4, "a_bits": 4, "rounding": "lsq", "granularity": "tensor"},
}


@pytest.mark.parametrize("mode", ["eval", "train", "both"])
@pytest.mark.parametrize("settings", WIDTHS.values(), ids=list(WIDTHS))
def test_empty_inputs_change_nothing(settings, mode):
    """Batches of size 0 do not count; a head without boxes has its bounds from the batches that have some."""
    ends = (settings["w_bits"], settings["a_bits"])
    model, full, none = Boxes(), torch.rand(8, 4).add(0.5), torch.zeros(0, 4)
    states = {}
    for name, batches in {"full": [full], "with empty": [none, full, none]}.items():
        qmodel = dq.quantize(model, first=ends, last=ends, **settings)
        dq.calibrate(qmodel, batches, mode=mode)
        states[name] = qmodel.state_dict()
    for key, value in states["full"].items():
        assert torch.equal(value, states["with empty"][key]), key
    qmodel = dq.quantize(model, first=ends, last=ends, **settings)
    report = dq.calibrate(qmodel, [torch.zeros(8, 4)], mode=mode)  # no boxes at all
    assert report.unseen == (() if settings["a_bits"] is None else ("head", "last"))
    assert all(torch.isfinite(value).all() for value in qmodel.state_dict().values())
    out = qmodel.train()(none)  # a training forward of nothing
    out.sum().backward()
    assert out.shape == (0, 2) and all(p.grad is None or p.grad.isfinite().all() for p in qmodel.parameters())
    assert dq.freeze(qmodel.eval())(none).shape == (0, 2)


def test_only_empty_batches_are_no_batches():
    with pytest.raises(CalibrationError, match="expected a batch with inputs, found 2 of size 0"):
        dq.calibrate(chain(), [torch.zeros(0, 3, 9, 9)] * 2)


# ------------------------------------------------------------------------------------------------------------ refusals


def nan_batch():
    images = torch.randn(2, 3, 9, 9)
    images[0, 0, 0, 0] = float("nan")
    return images


def interrupted():
    yield torch.randn(2, 3, 9, 9)
    raise OSError("disk is gone")


REFUSED = {
    "empty": ([], {}, CalibrationError, "expected at least one batch, found none"),
    "nan": ([torch.randn(2, 3, 9, 9), nan_batch()], {}, CalibrationError, "0: its input holds NaN or infinite"),
    "method": ([torch.randn(2, 3, 9, 9)], {"method": "msee"}, CalibrationError, "unknown method 'msee'.*Nearest: mse"),
    "mode": ([torch.randn(2, 3, 9, 9)], {"mode": "trian"}, CalibrationError, "unknown mode 'trian'.*Nearest: train"),
    "kind": ([7], {}, DataError, "batch: expected a tensor, a tuple or list .* found int"),
    "none": ([None], {}, DataError, "found NoneType"),
    "empty-tuple": ([()], {}, DataError, "found tuple of length 0"),
    "shape": ([torch.randn(2, 4, 9, 9)], {}, RuntimeError, "channels"),
    "loader": (interrupted(), {}, OSError, "disk is gone"),
}


@pytest.mark.parametrize("stage", ["fresh", "calibrated"])
@pytest.mark.parametrize("name", REFUSED)
def test_refusals_leave_the_model_unchanged(name, stage):
    batches, arguments, kind, message = REFUSED[name]
    batches = interrupted() if name == "loader" else batches
    qmodel = chain(w_bits=2).train()
    if stage == "calibrated":
        dq.calibrate(qmodel, [torch.randn(2, 3, 9, 9)])
    before = snapshot(qmodel)
    with pytest.raises(kind, match=message):
        dq.calibrate(qmodel, batches, **arguments)
    assert unchanged(qmodel, before)


def test_a_signed_input_of_one_bit_is_refused_by_name():
    qmodel = dq.quantize(awkward.Chain(), preset="paper-w1a1", first=(1, 1))
    before = snapshot(qmodel)
    with pytest.raises(
        CalibrationError, match=r'need 2 bits or more, found 1 bit at: 0 \(down to -.*match = "0", a_bits = 2'
    ):
        dq.calibrate(qmodel, [torch.randn(2, 3, 9, 9)])
    assert unchanged(qmodel, before)
    dq.calibrate(qmodel, [torch.rand(2, 3, 9, 9)])  # no negative value, no objection
    assert qmodel[0].input_quantizer.sign is False


def test_nan_is_seen_where_no_input_is_quantized():
    qmodel = dq.quantize(awkward.Chain().eval(), preset="paper-w1a32", first=(1, None))
    before = snapshot(qmodel)
    with pytest.raises(CalibrationError, match="0: its output holds NaN"):
        dq.calibrate(qmodel, [nan_batch()])
    assert unchanged(qmodel, before)


def test_a_failure_in_the_second_pass_takes_the_bounds_back():
    class Once(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.calls = nn.Linear(4, 4), 0

        def forward(self, x):
            self.calls += 1
            if self.calls == 2:
                raise KeyboardInterrupt
            return self.fc(x)

    qmodel = dq.quantize(Once(), first=(2, 4), last=(2, 4))
    before = snapshot(qmodel)
    with pytest.raises(KeyboardInterrupt):
        dq.calibrate(qmodel, [torch.randn(3, 4)])
    assert unchanged(qmodel, before)


def test_a_weight_that_went_wrong_is_named():
    qmodel = chain()
    qmodel[3].weight.data[0, 0] = float("inf")
    with pytest.raises(ConversionError, match="3: 9 of 576 weights are NaN or infinite"):
        dq.calibrate(qmodel, [torch.randn(2, 3, 9, 9)])


def test_a_weight_that_a_forward_uses_unseen_is_refused():
    """Control flow stops every trace here, and no name says whose weight is used: the forward is watched."""

    class Unseen(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.proj = nn.Linear(4, 4, bias=False), nn.Linear(4, 4)

        def forward(self, x):
            if x.sum() > 1e9:
                return x
            return self.proj(nn.functional.linear(x, self.get_submodule("qkv").weight))

    qmodel = dq.quantize(nn.Sequential(Unseen(), nn.Linear(4, 2)))
    before = snapshot(qmodel)
    with pytest.raises(ConversionError, match=r'0\.qkv: another module.*\(linear\).*exclude=\["0\.qkv"\]'):
        dq.calibrate(qmodel, [torch.randn(3, 4)])
    assert unchanged(qmodel, before)
    qmodel = dq.quantize(nn.Sequential(Unseen(), nn.Linear(4, 2)), exclude=["0.qkv"])
    dq.calibrate(qmodel, [torch.randn(3, 4)])
    assert torch.equal(dq.freeze(qmodel)(torch.ones(1, 4)), qmodel.eval()(torch.ones(1, 4)))


def test_models_that_cannot_be_calibrated():
    with pytest.raises(ConversionError, match="has no quantized layer. Call daqconvert.quantize"):
        dq.calibrate(awkward.Chain(), [torch.randn(2, 3, 9, 9)])
    qmodel = chain()
    dq.calibrate(qmodel, [torch.randn(2, 3, 9, 9)])
    with pytest.raises(FrozenError, match="calibrate: 0 is frozen"):
        dq.calibrate(dq.freeze(qmodel), [torch.randn(2, 3, 9, 9)])


def test_the_report_is_a_record():
    report = dq.calibrate(chain(), [torch.randn(2, 3, 9, 9)])
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.batches = 3
    assert str(report).endswith("3 inputs calibrated on 1 batches (mse, both modes)")
    assert len(quantized_sites(chain())) == 3


def five_times(model, how):
    if how == "load_state_dict":
        model.load_state_dict(
            {k: 5 * v for k, v in model.state_dict().items() if k.endswith(("weight", "bias"))}, False
        )
    elif how == "wrapped":
        state = {f"0.{k}": 5 * v for k, v in model.state_dict().items() if k.endswith(("weight", "bias"))}
        nn.Sequential(model).load_state_dict(state, strict=False)
    for layer in model[::2]:
        if how == "in place":
            with torch.no_grad():
                layer.weight.mul_(5)
        elif how == "data":
            layer.weight.data.mul_(5)
        elif how == "replaced":
            layer.weight = nn.Parameter(5 * layer.weight.detach())


@pytest.mark.parametrize("stage", ["new", "trained", "trained until now", "saved", "copied"])
@pytest.mark.parametrize("how", ["load_state_dict", "wrapped", "in place", "data", "replaced"])
def test_weight_bounds_are_set_anew_where_weights_were_changed_from_outside(how, stage):
    torch.manual_seed(0)
    x, make = torch.randn(64, 8), lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    qmodel = dq.quantize(make(), w_bits=8, a_bits=8)
    dq.calibrate(qmodel, [x])
    if stage.startswith("trained"):
        optimizer = torch.optim.SGD(qmodel.parameters(), 0.01)
        for _ in range(3):
            optimizer.zero_grad()
            qmodel.train()(x).square().mean().backward()
            optimizer.step()
    if stage == "trained":
        before = {k: v.clone() for k, v in qmodel.state_dict().items() if "weight_quantizer" in k}
        report = dq.calibrate(qmodel, [x])  # bounds that were trained with the weights stay
        assert report.refitted == report.unfit == ()
        assert all(torch.equal(v, qmodel.state_dict()[k]) for k, v in before.items())
    if stage == "saved":
        state, qmodel = qmodel.state_dict(), dq.quantize(make(), w_bits=8, a_bits=8)
        qmodel.load_state_dict(state)
    if stage == "copied":
        qmodel = copy.deepcopy(qmodel)
    if stage != "trained until now":
        assert dq.calibrate(qmodel, [x]).refitted == ()  # the weights are what they were
    five_times(qmodel, how)
    report = dq.calibrate(qmodel, [x])
    with torch.no_grad():
        with dq.disabled(qmodel):
            exact = qmodel.eval()(x)
        error = float((qmodel(x) - exact).norm() / exact.norm())
    if stage == "trained until now" and how not in ("load_state_dict", "wrapped"):
        assert report.unfit == ("0", "2") and report.refitted == ()  # told, where it cannot be known
        assert "0: its weight" in str(report) and "weight bounds" in str(report)
    else:
        assert report.refitted == ("0", "2") and error < 0.02
        assert "0: its weight was changed: weight bounds set anew" in str(report)
    assert dq.calibrate(qmodel, [x]).refitted == ()


def test_weights_that_gptq_chose_for_their_bounds_keep_them():
    torch.manual_seed(0)
    x = torch.randn(64, 8)
    qmodel = dq.quantize(nn.Sequential(nn.Linear(8, 16)), w_bits=3, first=(3, 8), last=(3, 8))
    dq.calibrate(qmodel, [x])
    choose_codes(qmodel, [x], [])
    before = qmodel[0].weight_quantizer.upper.detach().clone()
    assert dq.calibrate(qmodel, [x]).refitted == () and torch.equal(qmodel[0].weight_quantizer.upper, before)
