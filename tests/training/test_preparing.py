"""Before the first step: what calibrates a model, and what cannot."""

import pytest
import torch

import daqconvert as dq
from daqconvert.errors import CalibrationError
from daqconvert.training import finetune


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
