import pytest
import torch
import torch.nn.functional as F
from torch import nn

import daqconvert as dq
from daqconvert.errors import DataError, TrainingError
from daqconvert.models import float_copy
from daqconvert.training import Recipe
from daqconvert.training.losses import count_correct, cross_entropy, distillation, logits_of
from daqconvert.training.objective import Objective


def test_distillation_is_its_formula():
    torch.manual_seed(0)
    ours, theirs, t = torch.randn(5, 7), torch.randn(5, 7), 3.0
    p, q = (theirs / t).softmax(1), (ours / t).softmax(1)
    expected = t**2 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(distillation(ours, theirs, t), expected)
    maps = distillation(ours[..., None].expand(5, 7, 2), theirs[..., None].expand(5, 7, 2), t)
    torch.testing.assert_close(maps, expected)  # a mean over positions too


@pytest.mark.parametrize("distill", [0.0, 0.3, 1.0])
def test_the_loss_is_the_weighted_sum(distill):
    torch.manual_seed(0)
    model, teacher, x, y = nn.Linear(4, 3), nn.Linear(4, 3), torch.randn(5, 4), torch.tensor([0, 1, 2, 1, 0])
    smoothing = 0.1 if distill < 1.0 else 0.0
    recipe = Recipe(distill=distill, temperature=2.0, label_smoothing=smoothing)
    loss, outputs = Objective(recipe, teacher=teacher)(model, ((x,), {}), None if distill == 1.0 else y)
    hard = F.cross_entropy(model(x), y, label_smoothing=smoothing)
    expected = (1 - distill) * hard + distill * distillation(model(x), teacher(x), 2.0)
    torch.testing.assert_close(loss, expected)
    assert outputs.requires_grad
    loss.backward()
    assert teacher.weight.grad is None


def test_the_teacher_is_the_float_model(make_float):
    model = make_float()
    qmodel = dq.quantize(model, w_bits=2, a_bits=2).train()
    teacher, x = float_copy(qmodel), torch.randn(16, 8)
    assert torch.equal(teacher(x), model.eval()(x))
    assert qmodel.training
    assert qmodel[0].enabled
    assert not any(p.requires_grad for p in teacher.parameters())
    with torch.no_grad():
        qmodel[0].weight.zero_()
    assert torch.equal(teacher(x), model(x))  # a copy: it does not train along


def test_smoothing_and_classes():
    z = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    torch.testing.assert_close(cross_entropy(z, [0, 1]), F.cross_entropy(z, torch.tensor([0, 1])))
    torch.testing.assert_close(cross_entropy(z, torch.tensor([0, 1], dtype=torch.uint8)), cross_entropy(z, [0, 1]))
    torch.testing.assert_close(cross_entropy(z, torch.eye(2)), cross_entropy(z, [0, 1]))


def test_hits():
    z = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])
    assert count_correct(z, torch.tensor([0, 1, 2]), (1, 2)) == ([1, 2], 3)
    assert count_correct(z, torch.tensor([0, 1, -100]), (1, 2)) == ([1, 2], 2)
    assert count_correct(z, torch.eye(3), (1, 3)) == ([1, 3], 3)
    maps = z.T.reshape(1, 3, 3)  # one item, three positions
    assert count_correct(maps, torch.tensor([[0, 1, 2]])) == ([1], 3)


@pytest.mark.parametrize(
    ("target", "told"),
    [
        (torch.tensor([0, 5]), "expected classes 0 to 1.*found 0 to 5"),
        (torch.tensor([-1, 0]), "found -1 to 0"),
        (torch.tensor([0]), r"expected integers of shape \(2,\).*found torch.int64 of shape \(1,\)"),
        (torch.tensor([0.5, 1.0]), "found torch.float32 of shape"),
        (torch.tensor([0.0, 1.0]), r"Class numbers need target.long\(\)"),
        (["cat", "dog"], "found a list"),
        (None, "found a NoneType"),
        (torch.tensor([[0], [1]]), r"of shape \(2, 1\).*target.squeeze\(1\)"),
        (torch.eye(2).long(), r"of shape \(2, 2\).*target.float\(\) or target.argmax\(dim=1\)"),
        (torch.eye(2).bool(), r"found torch.bool of shape \(2, 2\).*target.float\(\)"),
        (torch.ones(2, 2), r"found values from 1 to 1 and sums from 2 to 2.*binary_cross_entropy_with_logits"),
        (torch.tensor([[1.0, 0.0], [0.0, 0.0]]), "sums from 0 to 1"),
        (torch.tensor([[1.5, -0.5], [0.0, 1.0]]), "found values from -0.5 to 1.5"),
        (torch.tensor([[1.0, 0.0], [torch.nan, 1.0]]), "expected none below 0, and sums over the classes of 1"),
        (torch.tensor([[0.5], [1.5]]), r"or probabilities of shape \(2, 2\).*found torch.float32 of shape \(2, 1\)"),
    ],
    ids=[
        "too large", "negative", "too few", "regression", "float classes", "words", "none", "column", "one-hot",
        "one-hot bools", "several labels", "no label", "negative share", "nan", "regression column",
    ],
)  # fmt: skip
def test_targets_that_do_not_fit(target, told):
    with pytest.raises(DataError, match=told):
        cross_entropy(torch.zeros(2, 2), target)


@pytest.mark.parametrize(
    "target",
    [torch.rand(4, 1), torch.zeros(4, 1), torch.zeros(4).long(), torch.zeros(4, 1).long(), torch.zeros(4).bool()],
    ids=["numbers", "zeros", "classes", "column", "bools"],
)
def test_one_output_is_no_classification(target):
    with pytest.raises(DataError, match=r"found shape \(4, 1\): with one output every cross entropy is 0.*mse_loss"):
        cross_entropy(torch.zeros(4, 1), target)
    with pytest.raises(DataError, match="with one output"):
        count_correct(torch.zeros(4, 1), target)


def test_maps_of_one_output_and_of_several_labels_are_no_classification():
    with pytest.raises(DataError, match=r"found shape \(2, 1, 3, 3\)"):
        cross_entropy(torch.zeros(2, 1, 3, 3), torch.zeros(2, 1, 3, 3))
    with pytest.raises(DataError, match="sums from 2 to 2"):
        cross_entropy(torch.zeros(2, 2, 3, 3), torch.ones(2, 2, 3, 3))
    maps, labels = torch.randn(2, 4, 3, 3), torch.randint(0, 4, (2, 3, 3))
    with pytest.raises(DataError, match=r"target.squeeze\(1\)"):
        cross_entropy(maps, labels[:, None])
    shares = F.one_hot(labels, 4).movedim(-1, 1).float()
    torch.testing.assert_close(cross_entropy(maps, shares), F.cross_entropy(maps, labels))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_probabilities_may_be_rounded(dtype):
    torch.manual_seed(0)
    logits, shares = torch.randn(8, 1000), torch.rand(8, 1000).softmax(1).to(dtype)
    expected = -(shares.float() * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(cross_entropy(logits, shares), expected)


def test_yes_and_no_are_the_classes_of_two_outputs():
    z, answers = torch.randn(5, 2), torch.tensor([True, False, True, True, False])
    torch.testing.assert_close(cross_entropy(z, answers), F.cross_entropy(z, answers.long()))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_what_has_no_target_does_not_count(smoothing):
    torch.manual_seed(0)
    z, y = torch.randn(6, 3, requires_grad=True), torch.tensor([0, -100, 2, 1, -100, 2])
    expected = F.cross_entropy(z[y >= 0], y[y >= 0], label_smoothing=smoothing)
    torch.testing.assert_close(cross_entropy(z, y, smoothing), expected)
    nothing = cross_entropy(z, torch.full((6,), -100), smoothing)  # torch's own is NaN, which would end a run
    nothing.backward()
    assert nothing.item() == 0.0
    assert not z.grad.any()


@pytest.mark.parametrize(
    "outputs", [{"logits": torch.zeros(2, 2)}, (torch.zeros(2, 2),), torch.zeros(2), torch.zeros(2, 2).long(), None],
    ids=["dict", "tuple", "no classes", "integers", "none"],
)  # fmt: skip
def test_outputs_that_are_no_logits(outputs):
    with pytest.raises(TrainingError, match="Pass loss_fn="):
        logits_of(outputs)


def test_logits_are_float32_at_least():
    assert logits_of(torch.zeros(1, 2, dtype=torch.bfloat16)).dtype == torch.float32
    assert logits_of(torch.zeros(1, 2, dtype=torch.float64)).dtype == torch.float64


def test_a_teacher_of_other_classes_is_refused():
    with pytest.raises(TrainingError, match=r"teacher's outputs have shape \(2, 4\), the model's \(2, 3\)"):
        distillation(torch.zeros(2, 3), torch.zeros(2, 4), 1.0)


def test_one_output_has_nothing_to_learn_from_a_teacher():
    with pytest.raises(TrainingError, match="softmax of one output is always 1.*distill=0.0"):
        distillation(torch.zeros(2, 1), torch.ones(2, 1), 1.0)


@pytest.mark.parametrize("returned", [torch.zeros(2), 0.5], ids=["vector", "number"])
def test_a_loss_fn_must_return_a_scalar_tensor(returned):
    objective = Objective(Recipe(distill=0.0), loss_fn=lambda outputs, target: returned)
    with pytest.raises(TrainingError, match="loss_fn: expected it to return a scalar tensor"):
        objective(nn.Linear(2, 2), ((torch.zeros(1, 2),), {}), None)
