"""Models of every rounding: one word changes it; LSQ trained, frozen, saved, exported, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import daqconvert as dq
from daqconvert.errors import PolicyError
from daqconvert.quantizers import InputQuantizer, WeightQuantizer
from daqconvert.quantizers.lsq import StepInputQuantizer, StepWeightQuantizer


def network():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 5),
    )  # fmt: skip


def trained(rounding, preset="paper-w2a2", steps=12, **settings):
    qmodel = dq.quantize(network(), preset=preset, rounding=rounding, **settings)
    x, target = torch.randn(16, 3, 6, 6), torch.randint(0, 5, (16,))
    dq.calibrate(qmodel, [x])
    optimizer = torch.optim.Adam(qmodel.parameters(), 1e-2)
    losses = []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(qmodel(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return qmodel, x, losses


@pytest.mark.parametrize("rounding", ["daq", "ste", "ewgs", "dsq", "lsq"])
def test_one_word_changes_the_rounding_and_every_one_trains(rounding):
    qmodel, x, losses = trained(rounding)
    assert losses[-1] < 0.6 * losses[0]
    assert {row.settings.rounding for row in dq.plan(qmodel).converted} == {rounding}
    kinds = {type(m) for m in qmodel.modules() if isinstance(m, (WeightQuantizer, InputQuantizer))}
    lsq = {StepWeightQuantizer, StepInputQuantizer}
    assert kinds == (lsq if rounding == "lsq" else {WeightQuantizer, InputQuantizer})
    gap = qmodel.eval()(x)
    assert torch.equal(dq.freeze(qmodel)(x), gap)


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("bits", [2, 5, 8])
def test_lsq_frozen_saved_and_loaded_is_the_same(bits, granularity, tmp_path):
    both = {"w_bits": bits, "a_bits": bits}
    qmodel, x, _ = trained("lsq", None, 6, **both, first=both, last=both, granularity=granularity)
    assert any(m.sign is True for m in qmodel.modules() if isinstance(m, InputQuantizer))
    frozen = dq.freeze(qmodel.eval())
    assert torch.equal(frozen(x), qmodel(x))
    codes = [m.weight_codes for m in frozen.modules() if "weight_codes" in m._buffers]
    assert len(codes) == 4 and max(int(c.max()) for c in codes) < 2**bits
    dq.save(frozen, tmp_path / "artifact")
    loaded = dq.load(tmp_path / "artifact", model=network())
    assert torch.equal(loaded(x), frozen(x))
    again = dq.quantize(network(), rounding="lsq", granularity=granularity, **both, first=both, last=both)
    again.load_state_dict(qmodel.state_dict())
    assert torch.equal(again.eval()(x), qmodel(x))


@pytest.mark.parametrize("deploy", ["float", "integer"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_lsq_exported_agrees(bits, deploy, tmp_path):
    both = {"w_bits": bits, "a_bits": bits}
    qmodel, x, _ = trained("lsq", None, 6, **both, first=both, last=both, deploy=deploy)
    frozen = dq.freeze(qmodel.eval())
    if deploy == "integer":
        notes = [" ".join(row.notes) for row in dq.plan(frozen).converted]
        assert ("reach -128" in notes[1]) == (bits == 8)
    report = dq.export(frozen, tmp_path / "model.onnx", x[:2], check_batches=[x])
    assert report.agrees, str(report)
    assert report.sqnr_same_codes > 100


def test_lsq_keeps_the_contract():
    qmodel, *_ = trained("lsq")
    layer = qmodel[2]
    for quantizer in (layer.weight_quantizer, layer.input_quantizer):
        assert list(dict(quantizer.named_parameters())) == ["step"]
        with torch.no_grad():
            quantizer.step.fill_(0.25)
    assert (layer.weight_quantizer.lower.item(), layer.weight_quantizer.upper.item()) == (-0.5, 0.25)
    assert (layer.input_quantizer.lower.item(), layer.input_quantizer.upper.item()) == (0.0, 0.75)
    shown = repr(layer)
    assert "2 bits, twos, per tensor, lsq" in shown and "2 bits, unsigned, lsq" in shown
    missing, unexpected = qmodel.load_state_dict(network().state_dict(), strict=False)
    assert all("quantizer" in key or key.endswith("output_scale") for key in missing) and not unexpected
    dq.load_float(qmodel, network().state_dict())
    dq.calibrate(qmodel, [torch.randn(4, 3, 6, 6)], method="std")
    assert layer.input_quantizer.step.item() != 0.25


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        pytest.param({"preset": "paper-w1a2"}, "defined for 2 bits and more; found w_bits = 1", id="weight"),
        pytest.param({"w_bits": 4, "a_bits": 1}, "found a_bits = 1", id="input"),
        pytest.param({"w_bits": 4, "grid": "integer"}, 'found grid = "integer". Set grid = "auto"', id="grid"),
        pytest.param({"w_bits": 4, "normalize": True}, "found normalize = true. Set grid", id="normalize"),
        pytest.param({"w_bits": 4, "rounding": "ste", "grid": "twos"}, 'belongs to rounding = "lsq"', id="twos"),
        pytest.param({"delta": -1}, "delta: expected a number of 0 or more; found -1", id="delta"),
        pytest.param({"alpha": 1}, "alpha: expected a number between 0 and 1, both excluded; found 1", id="alpha"),
        pytest.param({"alpha": True}, "alpha: expected a number", id="no number"),
    ],
)
def test_what_cannot_be_is_refused(asked, told):
    with pytest.raises(PolicyError) as caught:
        dq.quantize(network(), **{"rounding": "lsq", **asked})
    assert told in str(caught.value)
