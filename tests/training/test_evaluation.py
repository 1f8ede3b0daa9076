import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import daqconvert as dq
from daqconvert.errors import CalibrationError, DataError, TrainingError
from daqconvert.training import evaluate
from daqconvert.training.evaluation import Meter


def test_shares_and_loss_are_over_all_targets():
    torch.manual_seed(0)
    model, x, y = nn.Linear(4, 5), torch.randn(10, 4), torch.randint(0, 5, (10,))
    batches = [(x[:7], y[:7]), (x[7:], y[7:])]  # of unequal size
    found = evaluate(model, batches, topk=(1, 2, 5))
    z = model(x)
    assert found.top1 == found.topk[1] == pytest.approx((z.argmax(1) == y).float().mean().item())
    assert found.topk[2] == pytest.approx((z.topk(2).indices == y[:, None]).any(1).float().mean().item())
    assert found.topk[5] == 1.0
    assert found.loss == pytest.approx(F.cross_entropy(z, y).item(), rel=1e-6)
    assert found.count == 10
    assert str(found).endswith("10 targets")


def test_float_quantized_and_frozen_models_give_their_modes_back(make_float, val_loader):
    model = make_float()
    qmodel = dq.quantize(model, w_bits=8, a_bits=8)
    dq.calibrate(qmodel, val_loader)
    frozen = dq.freeze(qmodel)
    model.train()
    qmodel.train()
    qmodel[1].eval()
    modes = [module.training for module in qmodel.modules()]
    state = {key: value.clone() for key, value in qmodel.state_dict().items()}
    results = [evaluate(m, val_loader) for m in (model, qmodel, frozen)]
    assert [module.training for module in qmodel.modules()] == modes
    assert model.training
    assert not frozen.training
    assert all(torch.equal(value, state[key]) for key, value in qmodel.state_dict().items())  # batch norm too
    assert results[1] == results[2]
    assert results[0].count == 48


def test_modes_come_back_after_an_error(make):
    qmodel = make().train()
    with pytest.raises(CalibrationError):
        evaluate(qmodel, [(torch.zeros(2, 8), torch.tensor([0, 1]))])
    assert qmodel.training


def test_dicts_and_own_losses():
    class Net(nn.Module):
        def forward(self, pixels, scale):
            return {"boxes": pixels * scale}

    batches = [{"pixels": torch.ones(3, 2), "scale": torch.tensor(2.0), "labels": torch.ones(3, 2)}]
    found = evaluate(Net(), batches, loss_fn=lambda out, target: F.mse_loss(out["boxes"], target))
    assert (found.top1, found.loss, found.count, dict(found.topk)) == (None, 1.0, 3, {})


@pytest.mark.parametrize(
    ("batches", "error", "told"),
    [
        ([], DataError, "found none"),
        (3, DataError, "expected an iterable of batches.*found int"),
        (iter([(torch.zeros(1, 2), torch.tensor([0]))]), DataError, "used up after one pass"),
        ([torch.zeros(1, 2)], DataError, r"evaluate: batch 0: expected a target.*a tensor of shape \(1, 2\) alone"),
        ([{"input": torch.zeros(1, 2)}], DataError, "a dict with input"),
        ([(torch.zeros(1, 2),)], DataError, "a tuple of 1"),
        ([None], DataError, "evaluate: batch 0: batch: expected a tensor"),
        ([(torch.zeros(1, 2), torch.tensor([2]))], DataError, "expected classes 0 to 1"),
    ],
    ids=["empty", "no iterable", "iterator", "tensor", "dict", "tuple", "none", "class"],
)
def test_bad_batches(batches, error, told):
    with pytest.raises(error, match=told):
        evaluate(nn.Linear(2, 2), batches)


def test_numbers_are_measured_by_their_own_loss_alone():
    x, y = torch.randn(6, 2), torch.rand(6, 1)
    model = nn.Linear(2, 1)
    with pytest.raises(DataError, match=r"evaluate: batch 0: targets.*found shape \(6, 1\).*loss_fn="):
        evaluate(model, [(x, y)])
    found = evaluate(model, [(x, y)], loss_fn=F.mse_loss)
    assert (found.top1, dict(found.topk), found.count) == (None, {}, 6)
    assert found.loss == pytest.approx(F.mse_loss(model(x), y).item())


def test_several_labels_an_input_have_no_top1_even_where_one_batch_has_one_each():
    batches = [(torch.randn(3, 3), torch.eye(3)), (torch.randn(3, 3), torch.ones(3, 3))]
    for order in (batches, batches[::-1]):
        found = evaluate(nn.Linear(3, 3), order, loss_fn=F.binary_cross_entropy_with_logits)
        assert (found.top1, found.count) == (None, 6)


def test_the_mean_is_over_targets_whatever_the_batches():
    torch.manual_seed(0)
    model, x, y = nn.Linear(4, 3), torch.randn(8, 4), torch.tensor([0, -100, -100, 2, 1, 0, -100, -100])
    expected = F.cross_entropy(model(x), y).item()
    for size in (8, 3, 2, 1):  # batches of 2 and of 1 that have no target at all
        found = evaluate(model, list(zip(x.split(size), y.split(size), strict=True)))
        assert (found.loss, found.count) == (pytest.approx(expected, rel=1e-5), 4)
    with pytest.raises(DataError, match="each target -100"):
        evaluate(model, [(x, torch.full((8,), -100))])


def test_more_than_there_are_classes():
    with pytest.raises(TrainingError, match="topk: expected numbers from 1 to 2"):
        evaluate(nn.Linear(2, 2), [(torch.zeros(1, 2), torch.tensor([0]))], topk=(1, 5))


def test_a_meter_reads_nothing_before_it_is_asked():
    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    meter, z, y = Meter((1, 2)), torch.randn(6, 4), torch.randint(0, 4, (6,))
    with Reads() as reads:
        for _ in range(3):
            meter.add(0.5, 6, z, y, strict=True)
    assert reads.count == 0
    other = Meter((1, 2))
    other.load(meter.sums())
    hits = [int((z.topk(k).indices == y[:, None]).any(1).sum()) for k in (1, 2)]
    assert meter.shares == other.shares == {1: hits[0] / 6, 2: hits[1] / 6}
    assert (meter.inputs, meter.targets, meter.loss) == (18, 18, 0.5)
    other.load(meter.sums()[:-1])  # as written before batches without a class were counted
    assert other.shares == meter.shares
