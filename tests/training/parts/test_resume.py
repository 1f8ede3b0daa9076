"""A run that is stopped after any step and resumed ends as an unstopped one, with all parts and many optimizers."""

import pytest
import torch

import daqconvert as dq

CASES = {
    "ema": {"ema": 0.9},
    "ema of fewer and fewer bits": {"ema": 0.9, "progressive": [[0.3, 6, 6], [0.6, 3, 4]]},
    "reestimation": {"reestimate": 2, "ema": 0.5, "ema_warmup": False},
    "gptq": {"gptq": 2, "distill": 0.5, "features": ("4",)},
    "reconstruct": {"reconstruct": 3, "distill": 0.5, "optimizer": "adam", "lr_unit": "size"},
    "fresh statistics": {"reestimate": 2, "batch_norm": "freeze", "distill": 0.5, "ema": 0.5, "ema_warmup": False},
    "sharpening": {"final_w_sigma": 1.0, "final_a_sigma": 2.0, "final_sigma_bits": 2},
    "freezing": {"freeze_bounds_at": 0.4, "batch_norm_freeze_at": 0.6},
    "mixup and features": {"mixup": 0.5, "features": ("0", "4")},
    "lamb and lion": {"optimizer": "lamb", "quantizer_optimizer": "lion"},
    "adan and nadam": {"optimizer": "adan", "quantizer_optimizer": "nadamlegacy", "schedule": "linear"},
    "adafactor": {"optimizer": "cadafactor", "schedule": "step", "step_epochs": 1},
    "patience": {"patience": 1, "lr": 0.0},
    "all": {
        "ema": 0.9, "reestimate": 1, "progressive": [[0.5, 4, 4]], "freeze_bounds_at": 0.8, "optimizer": "adamw",
        "lr": 0.01, "features": ("4",), "mixup": 0.2, "accumulate": 2, "patience": 2,
    },
}  # fmt: skip


class Stopped(Exception):
    pass


@pytest.mark.parametrize("case", CASES)
def test_resumed_is_uninterrupted(case, make, loader, val_loader, tmp_path):
    options = {"epochs": 3, "progress": False, "checkpoint_steps": 1, **CASES[case]}
    whole = make()
    expected = dq.finetune(whole, loader(noise=0.1), val_loader, out_dir=tmp_path / "whole", **options)
    total = int(expected.history[-1]["step"])

    def stop_at(number):
        def on_step(step):
            if step.number == number:
                raise Stopped

        return on_step

    for last in (2, total // 2 + 1, total):  # the step that is stopped in is not in the checkpoint
        try:
            dq.finetune(make(), loader(noise=0.1), val_loader, out_dir=tmp_path / "cut", on_step=stop_at(last),
                        resume=True, **options)  # fmt: skip
        except Stopped:
            continue
    qmodel = make()
    found = dq.finetune(qmodel, loader(noise=0.1), val_loader, out_dir=tmp_path / "cut", resume=True, **options)
    theirs = whole.state_dict()
    assert [key for key, value in qmodel.state_dict().items() if not torch.equal(value, theirs[key])] == []
    keys = ("epoch", "step", "train_loss", "val_loss", "val_top1")
    assert [[row[key] for key in keys] for row in found.history] == [
        [row[key] for key in keys] for row in expected.history
    ]
    assert (found.best_epoch, found.epochs) == (expected.best_epoch, expected.epochs)
