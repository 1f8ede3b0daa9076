"""Mixing, features, the parts of the loss, and who teaches."""

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.data import Mixup
from torch import nn

import daqconvert as dq
from daqconvert.errors import DataError, TrainingError
from daqconvert.models import float_copy
from daqconvert.training import Recipe
from daqconvert.training.losses import cross_entropy, distillation
from daqconvert.training.objective import (
    NO_TEACHER,
    OWN_TEACHER,
    Objective,
    check_teacher,
    teacher_kind,
)
from daqconvert.training.objective.features import Collector, feature_loss, feature_names
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
    assert torch.equal(x, images())  # the caller's is not written to


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


def test_the_feature_loss_is_its_formula():
    torch.manual_seed(0)
    a, b, c, d = torch.randn(3, 4), torch.randn(3, 4), torch.randn(2, 5, 5), torch.randn(2, 5, 5)
    expected = ((a - b).square().mean() / b.square().mean() + (c - d).square().mean() / d.square().mean()) / 2
    torch.testing.assert_close(
        feature_loss({"x": [a], "y": [(c, 1)]}, {"x": [b], "y": [(d, 1)]}, ["x", "y"]), expected
    )
    twice = (
        ((a - b).square().mean() + (b - a).square().mean() * b.square().mean() / a.square().mean())
        / b.square().mean()
        / 2
    )
    torch.testing.assert_close(feature_loss({"x": [a, b]}, {"x": [b, a]}, ["x"]), twice)
    assert feature_loss({"x": [torch.zeros(2)]}, {"x": [torch.zeros(2)]}, ["x"]) == 0.0


@pytest.fixture
def taught(make, make_float):
    qmodel = make().train()
    dq.calibrate(qmodel, [torch.randn(32, 8)])
    return qmodel, float_copy(qmodel)


def step(objective, model):
    torch.manual_seed(5)
    return objective(model, ((torch.randn(16, 8),), {}), None)[0]


def test_features_are_drawn_towards_the_teachers(taught):
    qmodel, teacher = taught
    recipe = Recipe(distill=1.0, features=("2", "4"), feature_weight=3.0)
    objective = Objective(recipe, teacher=teacher)
    loss = step(objective, qmodel)
    torch.manual_seed(5)
    x = torch.randn(16, 8)
    seen = {}
    for name in ("2", "4"):
        seen[name] = [qmodel[: int(name) + 1], teacher[: int(name) + 1]]
    parts = objective.last_parts
    torch.testing.assert_close(loss.detach(), parts["distill"] + 3.0 * parts["features"])
    objective.close()
    qmodel.eval()  # no dropout, and the same statistics for both
    objective = Objective(recipe, teacher=teacher)
    objective(qmodel, ((x,), {}), None)[0].backward()
    ratios = [(m(x) - t(x)).square().mean() / t(x).square().mean() for m, t in seen.values()]
    torch.testing.assert_close(objective.last_parts["features"], (sum(ratios) / 2).detach())
    assert all(p.grad is None for p in teacher.parameters())
    assert qmodel[0].weight.grad is not None


def test_a_pattern_of_features_passes_quantizers_over(taught):
    names = feature_names(Recipe(features=("*",)), taught[0])
    assert names == [str(i) for i in range(7)]
    assert step(Objective(Recipe(distill=1.0, features=("*",)), teacher=taught[1]), taught[0]).isfinite()


def blocks(last: nn.Module) -> nn.Sequential:
    inner = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    return nn.Sequential(nn.Linear(4, 4), nn.Sequential(inner, nn.ReLU()), nn.Linear(4, 4), last)


def test_auto_is_every_block_and_what_lies_between_them():
    qmodel = dq.quantize(blocks(nn.Linear(4, 3)))
    assert feature_names(Recipe(features=("auto",)), qmodel) == ["1.0", "2"]
    assert feature_names(Recipe(features=("auto", "3")), qmodel) == ["1.0", "2", "3"]
    assert (
        feature_names(Recipe(features=("auto",)), dq.quantize(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))) == []
    )


def test_auto_leaves_what_the_teacher_does_not_have_and_a_name_does_not():
    qmodel = dq.quantize(blocks(nn.Linear(4, 3)))
    dq.calibrate(qmodel, [torch.randn(8, 4)])
    other = nn.Sequential(nn.Linear(4, 4), nn.Identity(), nn.Linear(4, 4), nn.Linear(4, 3))
    check_teacher(other, qmodel, Recipe(distill=1.0, features=("auto",)))
    objective = Objective(Recipe(distill=1.0, features=("auto",)), teacher=other)
    objective(qmodel, ((torch.randn(8, 4),), {}), None)[0].backward()
    assert [collector.names for collector in objective._collectors] == [["2"], ["2"]]
    objective.close()
    with pytest.raises(TrainingError, match="'1.0' is a module of the model, but not of the teacher"):
        check_teacher(other, qmodel, Recipe(distill=1.0, features=("auto", "1.0")))


def test_auto_leaves_what_one_of_them_does_not_call():
    class Uncalled(nn.Sequential):
        def forward(self, x):
            return self[3](self[2](self[0](x))) if self.training else super().forward(x)

    qmodel = dq.quantize(Uncalled(*blocks(nn.Linear(4, 3)))).train()
    dq.calibrate(qmodel, [torch.randn(8, 4)])
    x = torch.randn(8, 4)
    objective = Objective(Recipe(distill=1.0, features=("auto",)), teacher=float_copy(qmodel))
    objective(qmodel.train(), ((x,), {}), None)
    assert objective.last_parts["features"].isfinite()
    objective.close()
    objective = Objective(Recipe(distill=1.0, features=("1.0",)), teacher=float_copy(qmodel))
    with pytest.raises(TrainingError, match="'1.0' was called 0 times by the model and 1 times"):
        objective(qmodel, ((x,), {}), None)


def test_hooks_are_gone_after_close_and_copies_have_inert_ones(taught):
    qmodel, teacher = taught
    objective = Objective(Recipe(distill=1.0, features=("4",)), teacher=teacher)
    step(objective, qmodel)
    twin = copy.deepcopy(qmodel)
    assert [hook.collector for hook in twin[4]._forward_hooks.values()] == [None]
    twin(torch.randn(4, 8))
    qmodel(torch.randn(4, 8))
    assert objective._collectors[0].found == {}  # recorded in training steps alone
    pickle.loads(pickle.dumps(list(qmodel[4]._forward_hooks.values())))
    objective.close()
    assert not any(module._forward_hooks for net in (qmodel, teacher) for module in net.modules())
    step(objective, qmodel)  # attaches them again
    objective.close()


@pytest.mark.parametrize(
    ("ours", "theirs", "told"),
    [
        ([], [torch.ones(1)], "called 0 times by the model and 1 times.*torch.compiler.reset"),
        ([torch.ones(2)], [torch.ones(3)], r"shape \(2,\) in the model, \(3,\) in the teacher"),
        ([torch.ones(2).long()], [torch.ones(2)], "of the model returned a tensor of torch.int64"),
        ([None], [torch.ones(2)], "of the model returned a NoneType"),
    ],
)
def test_features_that_do_not_fit(ours, theirs, told):
    with pytest.raises(TrainingError, match=f"features: 'a' .*{told}"):
        feature_loss({"a": ours}, {"a": theirs}, ["a"])


def test_who_teaches(make, make_float):
    qmodel, features = make(), Recipe(distill=0.0, features=("4",))
    assert teacher_kind(None, features) == OWN_TEACHER
    assert teacher_kind(None, Recipe(distill=0.0)) == NO_TEACHER
    check_teacher(make_float(), qmodel, features)
    with pytest.raises(TrainingError, match="no effect.*no features"):
        check_teacher(make_float(), qmodel, Recipe(distill=0.0))
    with pytest.raises(TrainingError, match='features: "layer4" matches no module'):
        check_teacher(None, qmodel, Recipe(features=("layer4",)))
    with pytest.raises(TrainingError, match="'4' is a module of the model, but not of the teacher"):
        check_teacher(nn.Sequential(nn.Linear(8, 3)), qmodel, features)


def test_smoothing_with_a_loss_of_ones_own_has_no_effect():
    with pytest.raises(TrainingError, match="label_smoothing: has no effect with a loss_fn"):
        Objective(Recipe(label_smoothing=0.1), loss_fn=F.mse_loss)


@pytest.mark.slow
def test_features_of_a_compiled_model(taught):
    qmodel, teacher = taught
    plain = copy.deepcopy(qmodel)
    recipe = Recipe(distill=1.0, features=("2", "5"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    qmodel.compile()
    objectives = [Objective(recipe, teacher=teacher) for _ in range(2)]
    for _ in range(3):
        found = []
        for objective, net in zip(objectives, (qmodel.eval(), plain.eval()), strict=True):
            net.zero_grad()
            loss = step(objective, net)
            loss.backward()
            found.append((loss.detach(), net[0].weight.grad))
        torch.testing.assert_close(found[0], found[1])
        qmodel(torch.randn(4, 8))  # a call that records nothing
    assert not torch._dynamo.utils.counters["graph_break"]
    for objective in objectives:
        objective.close()
    torch._dynamo.reset()
    qmodel(torch.randn(16, 8))
    collector = Collector(qmodel, ["2"])
    collector.start()
    qmodel(torch.randn(16, 8))
    assert collector.take() == {}  # compiled before: hooks that come later are not seen, so this is an error
    collector.close()
