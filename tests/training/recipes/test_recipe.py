"""Values that a field cannot take, and fields that do not go together."""

import pytest

from daqconvert.errors import TrainingError
from daqconvert.training import Recipe, recipe


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0), ("epochs", 2.0), ("epochs", True), ("lr", -1), ("lr", float("nan")), ("lr", "0.1"),
        ("lr", 10**400), ("momentum", 1.0), ("weight_decay", float("inf")), ("decay", "weight"),
        ("quantizer_lr", None), ("schedule", "cosin"), ("warmup_steps", -1), ("batch_size", 0),
        ("label_smoothing", 1.0), ("distill", 1.5), ("temperature", 0), ("clip_grad", -1.0), ("clip_grad", False),
        ("accumulate", 0), ("no_decay", [1]), ("features", ["", "a"]), ("ema", 1.0), ("ema_warmup", 1),
        ("reestimate", -1), ("freeze_bounds_at", 1.5), ("progressive", [[0.5, 4]]), ("progressive", [[1.0, 4, 4]]),
        ("progressive", [[0.5, 2, 2], [0.6, 4, 4]]), ("progressive", [[0.5, 4, 4], [0.5, 2, 2]]),
        ("progressive", [[0.5, 9, 4]]), ("patience", 1.0), ("keep", 0), ("oscillation", "no"),
        ("batch_norm", True), ("calibration_batches", 0), ("calibration_method", "mean"), ("seed", 1.5), ("name", 3),
    ],
    ids=lambda value: repr(value)[:12],
)  # fmt: skip
def test_an_impossible_value_names_the_field(field, value):
    with pytest.raises(TrainingError, match=rf"{field}: expected .*; found"):
        Recipe(**{field: value})


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"features": ("a",), "feature_weight": 0}, "features: have no effect"),
        ({"label_smoothing": 0.1, "distill": 1.0}, "label_smoothing: has no effect"),
        ({"batch_norm": "freeze", "batch_norm_freeze_at": 0.5}, "batch_norm_freeze_at: has no effect"),
        ({"batch_norm_freeze_at": 0.5, "reestimate": 2}, "reestimate: takes statistics anew"),
        ({"progressive": [[0.5, 4, 4]], "freeze_bounds_at": 0.4}, "0.4 is before the end of the last stage"),
        ({"lr_unit": "size"}, "^recipe 'quick': optimizer: a step of 'sgd' is as large as the gradient"),
        ({"lr_unit": "size", "optimizer": "adam", "quantizer_optimizer": "nesterov"}, "quantizer_optimizer: a step"),
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_options_that_do_not_go_together(changes, told):
    with pytest.raises(TrainingError, match=told):
        recipe("quick", **changes)
