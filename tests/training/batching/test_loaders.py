"""Loaders that cannot be trained or evaluated with."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import daqconvert as dq
from daqconvert.errors import DataError
from daqconvert.training import finetune


@pytest.mark.parametrize(
    ("train", "val", "told"),
    [
        ([], None, "train_loader: expected at least one batch"),
        (3, None, "train_loader: expected an iterable"),
        (iter([]), None, "train_loader: expected something that can be read once an epoch"),
        ([torch.zeros(4, 8)], None, "train_loader, first batch: expected a target.*distill=1.0"),
        (["x"], None, "train_loader, first batch: batch: expected a tensor"),
        (None, [], "val_loader: expected at least one batch"),
        (None, [torch.zeros(4, 8)], r"val_loader, first batch: expected a target.* alone\.$"),
    ],
    ids=["empty", "no iterable", "iterator", "no target", "text", "empty val", "no val target"],
)
@pytest.mark.parametrize("calibrated", [True, False], ids=["calibrated", "raw"])
def test_bad_loaders_leave_nothing_behind(make, loader, tmp_path, train, val, told, calibrated):
    qmodel, good = make(), loader()
    if calibrated:
        dq.calibrate(qmodel, good)
    with pytest.raises(DataError, match=told):
        finetune(qmodel, good if train is None else train, val, out_dir=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


class Two(nn.Module):
    """Needs two inputs, and can do without a third."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, left, right, scale=1.0):
        return self.second(F.relu(self.first(left - right)) * scale)


def test_several_inputs_are_given_as_to_export(tmp_path):
    torch.manual_seed(1)
    left, right, target = torch.randn(16, 4), torch.randn(16, 4), torch.randint(0, 3, (16,))
    expected = F.cross_entropy(Two()(left, right), target).item()
    forms = {
        "flat": (left, right, target), "inputs apart": ((left, right), target),
        "dict": {"left": left, "right": right, "target": target},
    }  # fmt: skip
    for form, batch in forms.items():
        assert dq.evaluate(Two(), [batch]).loss == pytest.approx(expected), form
    bounds = []
    for batch in ((left, right), ((left, right),), *forms.values()):
        qmodel = dq.quantize(Two(), w_bits=8, a_bits=8, example_inputs=(left, right))
        dq.calibrate(qmodel, [batch])
        bounds.append(qmodel.state_dict())
    for found in bounds[1:]:
        assert all(torch.equal(value, bounds[0][key]) for key, value in found.items())
    result = finetune(qmodel, [forms["flat"]], [forms["inputs apart"]], epochs=8, lr=0.05)
    assert result.history[-1]["val_loss"] < result.history[0]["val_loss"]


def test_a_model_that_needs_one_input_gets_the_first_entry():
    class Pair(nn.Module):
        def forward(self, pair, scale=1.0):
            return pair[0] + pair[1]

    left, right = torch.randn(4, 3), torch.randn(4, 3)
    target = torch.tensor([0, 1, 2, 0])
    found = dq.evaluate(Pair(), [((left, right), target)]).loss
    assert found == pytest.approx(F.cross_entropy(left + right, target).item())
