"""Before the first step: what calibrates a model, and what cannot."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import daqconvert as dq
from daqconvert.errors import CalibrationError, DataError, TrainingError
from daqconvert.training import finetune, finetuning
from daqconvert.training.preparing import may_miss_gradients


def test_calibrates_only_what_is_not_calibrated(make, loader):
    qmodel = make()
    dq.calibrate(qmodel, loader(), method="minmax")
    result = finetune(qmodel, loader(), epochs=1, lr=0.0, quantizer_lr=0.0)
    assert result.calibration is None
    other = make()
    report = finetune(other, loader(), epochs=1, calibration_method="minmax", calibration_batches=2).calibration
    assert (report.method, report.batches) == ("minmax", 2)


def test_data_that_cannot_calibrate(make, tmp_path):
    batch = (torch.full((4, 8), float("nan")), torch.zeros(4, dtype=torch.long))
    with pytest.raises(CalibrationError, match="NaN"):
        finetune(make(), [batch], out_dir=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("outputs", "target", "told"),
    [
        (1, torch.rand(4, 1), "one output every cross entropy is 0.*distill=0.0"),
        (3, torch.rand(4, 3), "sums over the classes of 1"),
        (3, torch.tensor([0, 1, 2, 3]), "expected classes 0 to 2, as the model has 3 outputs; found 0 to 3"),
        (3, torch.rand(4), r"expected integers of shape \(4,\)"),
    ],
    ids=["regression", "several labels", "fewer outputs", "numbers"],
)
@pytest.mark.parametrize("place", ["train_loader", "val_loader"])
def test_targets_that_do_not_fit_are_found_before_any_work(tmp_path, outputs, target, told, place):
    qmodel = dq.quantize(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, outputs)), w_bits=4, a_bits=4)
    calls, bad = [], [(torch.randn(4, 8), target)]
    qmodel[0].register_forward_hook(lambda *_: calls.append(1))
    before = {key: value.clone() for key, value in qmodel.state_dict().items()}
    loaders = (bad,) if place == "train_loader" else ([(torch.randn(4, 8), torch.zeros(4).long())], bad)
    with pytest.raises(DataError, match=f"{place}, first batch: targets.*{told}"):
        finetune(qmodel, *loaders, distill=0.0, out_dir=tmp_path / "run")
    assert calls == []
    assert all(torch.equal(value, before[key]) for key, value in qmodel.state_dict().items())
    assert list(tmp_path.iterdir()) == []


def test_numbers_are_learned_by_their_own_loss():
    torch.manual_seed(0)
    x = torch.randn(64, 8)
    batches = [(x, x.sum(1, keepdim=True))]
    qmodel = dq.quantize(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1)), w_bits=8, a_bits=8)
    result = finetune(qmodel, batches, batches, loss_fn=F.mse_loss, distill=0.0, epochs=30, lr=0.05)
    assert result.history[-1]["val_loss"] < 0.5 * result.history[0]["val_loss"]
    assert {(row["train_top1"], row["val_top1"]) for row in result.history} == {(None, None)}
    with pytest.raises(TrainingError, match="softmax of one output is always 1"):
        finetune(qmodel, batches, loss_fn=F.mse_loss)  # half of `quick` is distillation


class Branches(nn.Module):
    """A model of which one layer may stay unused: always, where the input says so, or never."""

    def __init__(self, kind):
        super().__init__()
        self.first, self.side, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.kind = kind

    def forward(self, x):
        y = self.first(x).relu()
        if self.kind == "never" or (self.kind == "by the input" and x.sum() > -1e9):
            y = y + self.side(y)
        return self.last(y)


@pytest.mark.parametrize(("kind", "may"), [("never", False), ("always", True), ("by the input", True)])
def test_parameters_without_a_gradient_are_looked_for_where_there_may_be_some(monkeypatch, kind, may):
    qmodel = dq.quantize(Branches(kind), w_bits=4, a_bits=4)
    seen = []
    monkeypatch.setattr(finetuning, "train", lambda run, *_: seen.append(run))
    batches = [(torch.randn(4, 8), torch.randint(0, 3, (4,)))]
    random = torch.get_rng_state()
    finetune(qmodel, batches, epochs=1)
    (run,) = seen
    calibrated = {k: v.clone() for k, v in qmodel.state_dict().items()}
    assert may_miss_gradients(run) == may
    assert all(torch.equal(v, calibrated[k]) for k, v in qmodel.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


def test_weights_that_were_changed_after_calibration_get_bounds_that_fit(make, make_float, loader, caplog):
    """Weights five times larger lay outside of the old bounds, and training began with them clipped, silently."""
    qmodel = make(8)
    dq.calibrate(qmodel, loader())
    weights = {key: 5 * value for key, value in make_float().state_dict().items() if key == "0.weight"}
    qmodel.load_state_dict(weights, strict=False)
    fitting = make(8)
    dq.load_float(fitting, {**make_float().state_dict(), **weights})
    dq.calibrate(fitting, loader())
    finetune(qmodel, loader(), epochs=1, lr=0.0, quantizer_lr=0.0)
    assert "the weights of 1 layers (0) were changed after calibration" in caplog.text
    assert torch.equal(qmodel[0].weight_quantizer.upper, fitting[0].weight_quantizer.upper)
    caplog.clear()
    finetune(qmodel, loader(), epochs=1)
    finetune(qmodel, loader(), epochs=1)
    assert "were changed" not in caplog.text
