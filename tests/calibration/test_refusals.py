"""A model that cannot be calibrated is not changed, and the error says why."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import daqconvert as dq
from daqconvert.errors import CalibrationError, ConversionError, DataError, FrozenError
from daqconvert.models import quantized_sites
from helpers import awkward_models as awkward


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


# ------------------------------------------------------------------------------------------------- refusals


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
    assert str(report).endswith("3 inputs calibrated on 1 batches (mse)")
    assert len(quantized_sites(chain())) == 3
