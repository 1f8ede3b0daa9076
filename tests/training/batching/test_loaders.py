"""Loaders that cannot be trained or evaluated with."""

import pytest
import torch

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
