"""The loss of a batch: mixed inputs, its parts, and options without effect."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.data import Mixup
from torch import nn

from daqconvert.errors import DataError, TrainingError
from daqconvert.training import Recipe
from daqconvert.training.losses import cross_entropy, distillation
from daqconvert.training.objective import (
    Objective,
)
from daqconvert.training.objective.loss import mixed


def images(count=6, seed=0):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("options", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.2, "cutmix": 1.0}], ids=str)
def test_an_even_batch_is_timms(options):
    x, y = images(), torch.tensor([0, 1, 2, 3, 0, 1])
    for seed in range(4):
        np.random.seed(seed)
        mixture = mixed(((x,), {}), Recipe(**options))
        np.random.seed(seed)
        timms = Mixup(options.get("mixup", 0.0), options.get("cutmix", 0.0), label_smoothing=0.0, num_classes=4)
        expected, target = timms(x.clone(), y)
        assert torch.equal(mixture.inputs[0][0], expected)
        torch.testing.assert_close(mixture.target(torch.zeros(6, 4), y), target)
    assert torch.equal(x, images())  # the caller's tensor is not changed


@pytest.mark.parametrize("count", [1, 5])
def test_the_last_of_an_odd_batch_stays(count):
    x, y = images(count), torch.arange(count) % 4
    np.random.seed(0)
    mixture = mixed(((), {"pixels": x}), Recipe(mixup=0.8))
    found = mixture.inputs[1]["pixels"]
    assert torch.equal(found[-1], x[-1])
    assert torch.equal(mixture.target(torch.zeros(count, 4), y)[-1], F.one_hot(y[-1], 4).float())
    if count > 1:
        share = mixture.shares[0, 0]
        torch.testing.assert_close(found[0], share * x[0] + (1 - share) * x[3])
        torch.testing.assert_close(mixture.shares[0, 3], 1 - share)


@pytest.mark.parametrize(
    ("inputs", "told"),
    [
        (
            ((torch.zeros(2, 3, 4, 4), torch.zeros(2)), {}),
            r"only input, found \(2, 3, 4, 4\) of torch.float32, \(2,\)",
        ),
        (((torch.zeros(2, 3),), {}), r"expected images \(N, C, H, W\)"),
        (((torch.zeros(2, 3, 4, 4).long(),), {}), "of torch.int64"),
        (((), {"x": 3}), "found no tensor"),
    ],
)
def test_what_cannot_be_mixed(inputs, told):
    with pytest.raises(DataError, match=told):
        mixed(inputs, Recipe(cutmix=1.0))


def test_targets_that_cannot_be_mixed():
    mixture = mixed(((torch.zeros(2, 3),), {}), Recipe(mixup=1.0))
    with pytest.raises(DataError, match="expected targets 0 to 2, found -100 to 1"):
        mixture.target(torch.zeros(2, 3), torch.tensor([-100, 1]))
    with pytest.raises(DataError, match=r"expected logits \(N, C\)"):
        mixture.target(torch.zeros(2, 3, 2), torch.zeros(2, 2).long())


def test_teacher_and_model_see_the_same_mixture_and_only_in_training():
    torch.manual_seed(0)
    model, teacher, x, y = nn.Linear(4, 3), nn.Linear(4, 3), torch.randn(4, 4), torch.tensor([0, 1, 2, 0])
    recipe = Recipe(distill=0.25, temperature=2.0, label_smoothing=0.1, mixup=1.0)
    objective = Objective(recipe, teacher=teacher)
    np.random.seed(3)
    loss, _ = objective(model.train(), ((x,), {}), y)
    np.random.seed(3)
    timms = Mixup(1.0, label_smoothing=0.1, num_classes=3)
    mix, target = timms(x.clone(), y)
    hard, soft = cross_entropy(model(mix), target), distillation(model(mix), teacher(mix), 2.0)
    torch.testing.assert_close(loss, 0.75 * hard + 0.25 * soft)
    torch.testing.assert_close(objective.last_parts, {"hard": hard.detach(), "distill": soft.detach()})
    loss, _ = objective(model.eval(), ((x,), {}), y)
    plain = 0.75 * cross_entropy(model(x), y, 0.1) + 0.25 * distillation(model(x), teacher(x), 2.0)
    torch.testing.assert_close(loss, plain)


def test_mixing_needs_no_targets():
    model = nn.Linear(4, 3).train()
    loss, _ = Objective(Recipe(distill=1.0, mixup=1.0), teacher=nn.Linear(4, 3))(
        model, ((torch.ones(2, 4),), {}), None
    )
    assert loss.isfinite()


def test_smoothing_with_a_loss_of_ones_own_has_no_effect():
    with pytest.raises(TrainingError, match="label_smoothing: has no effect with a loss_fn"):
        Objective(Recipe(label_smoothing=0.1), loss_fn=F.mse_loss)
