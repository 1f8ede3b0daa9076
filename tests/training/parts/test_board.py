"""Scalars that TensorBoard reads."""

import pytest

from helpers.written_runs import scalars


def test_scalars_for_tensorboard(whole):
    out, result = whole
    found = scalars(out)
    assert [step for step, _ in found["step/loss"]] == [10, 20, 30, 40]
    assert [step for step, _ in found["epoch/val_top1"]] == [12, 24, 36, 48]
    assert [value for _, value in found["epoch/oscillating"]] == pytest.approx(
        [row["oscillating"] for row in result.history]
    )
    for tag in ("step/lr", "step/grad_norm", "epoch/train_loss", "4/weight_upper", "4/input_upper", "4/scale_mean"):
        assert len(found[tag]) == 4, tag
