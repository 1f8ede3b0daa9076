import pytest

import daqconvert as dq
from daqconvert.errors import TrainingError


def test_it_stops_when_nothing_was_better_for_a_while(make, loader, val_loader):
    still = {"lr": 0.0, "quantizer_lr": 0.0, "batch_norm": "freeze"}  # every epoch is as good as the first
    result = dq.finetune(make(), loader(), val_loader, epochs=9, patience=2, progress=False, **still)
    assert (result.epochs, result.best_epoch) == (3, 1)
    assert "no epoch was better than epoch 1 for 2 epochs" in str(result)


def test_it_goes_on_while_there_is_progress(make, loader, val_loader):
    result = dq.finetune(make(8), loader(), val_loader, epochs=4, patience=3, lr=0.01, progress=False)
    assert result.epochs == 4


def test_a_stopped_run_is_not_resumed(make, loader, val_loader, tmp_path):
    still = {"lr": 0.0, "quantizer_lr": 0.0, "batch_norm": "freeze", "epochs": 9, "patience": 1, "progress": False}
    first = dq.finetune(make(), loader(), val_loader, out_dir=tmp_path / "run", **still)
    again = dq.finetune(make(), loader(), val_loader, out_dir=tmp_path / "run", resume=True, **still)
    assert (first.epochs, again.epochs) == (2, 2)


def test_patience_needs_something_to_look_at(make, loader):
    with pytest.raises(TrainingError, match="patience: needs a val_loader"):
        dq.finetune(make(), loader(), epochs=2, patience=1, progress=False)
