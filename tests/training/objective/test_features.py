"""Features: which modules they are, their loss, and the hooks that collect their outputs."""

import copy
import pickle

import pytest
import torch
from torch import nn

import daqconvert as dq
from daqconvert.errors import TrainingError
from daqconvert.models import float_copy
from daqconvert.training import Recipe
from daqconvert.training.objective import (
    Objective,
    check_teacher,
)
from daqconvert.training.objective.features import Collector, feature_loss, feature_names


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
    assert objective._collectors[0].found == {}  # only training steps are recorded
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
    assert collector.take() == {}  # the model was compiled before this hook came: hence the error in training
    collector.close()
