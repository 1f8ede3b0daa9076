"""Batch norms of a run: statistics that are frozen from some step on, and statistics that are estimated anew."""

import itertools
import types
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import daqconvert as dq
from daqconvert.errors import TrainingError
from daqconvert.posttraining import reestimate
from daqconvert.training.batching.epochs import Epochs
from daqconvert.training.parts.batch_norm import Reestimation


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4, momentum=0.3))


def test_a_context_gives_everything_back():
    loader = [(torch.randn(8, 4), torch.zeros(8).long()) for _ in range(4)]
    model = net().train()
    processes = types.SimpleNamespace(device=torch.device("cpu"), autocast=nullcontext)
    part = Reestimation(model, Epochs(loader, 0), processes, 2)
    part.start()
    part.before_epoch(1)
    before, random = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    with part.evaluating():
        torch.testing.assert_close(model[1].running_mean, torch.stack([x.mean(0) for x, _ in loader[:2]]).mean(0))
        assert torch.equal(torch.get_rng_state(), random)
        inside = {k: v.clone() for k, v in model.state_dict().items()}
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    part.finish()
    assert all(torch.equal(v, inside[k]) for k, v in model.state_dict().items())


def steps(qmodel, loader, val_loader=None, **options):
    seen = []
    options = {"progress": False, "epochs": 2, "lr": 0.1, **options}
    result = dq.finetune(
        qmodel, loader(), val_loader, **options,
        on_step=lambda step: seen.append({k: v.detach().clone() for k, v in qmodel.state_dict().items()}),
    )  # fmt: skip
    return seen, result


def test_training_does_not_see_a_reestimation_and_the_end_keeps_it(make, loader, val_loader):
    plain, before = steps(make(), loader, val_loader)
    qmodel = make()
    seen, result = steps(qmodel, loader, val_loader, reestimate=2)
    assert all(torch.equal(a[k], b[k]) for a, b in zip(seen, plain, strict=True) for k in a)
    assert result.history[0]["val_loss"] != before.history[0]["val_loss"]
    assert dq.evaluate(qmodel, val_loader).loss == result.history[result.best_epoch - 1]["val_loss"]


def test_frozen_statistics_are_taken_once_before_the_first_step(make, loader, val_loader):
    qmodel = make()
    dq.calibrate(qmodel, [x for x, _ in val_loader])
    float_mean = qmodel[1].running_mean.clone()
    seen, result = steps(qmodel, loader, val_loader, reestimate=3, batch_norm="freeze", distill=0.5)
    assert not torch.equal(seen[0]["1.running_mean"], float_mean)
    assert all(torch.equal(state["1.running_mean"], seen[0]["1.running_mean"]) for state in seen)
    assert dq.evaluate(qmodel, val_loader).loss == result.history[result.best_epoch - 1]["val_loss"]
    untrained = make()
    dq.calibrate(untrained, [x for x, _ in val_loader])
    steps(untrained, loader, reestimate=3, batch_norm="freeze", lr=0.0, quantizer_lr=0.0, epochs=1)
    first = untrained.state_dict()["1.running_mean"]
    assert torch.equal(first, seen[0]["1.running_mean"])  # those of the weights that training starts from


def test_averaged_weights_have_statistics_of_their_own(make, loader, val_loader):
    qmodel = make()
    _, result = steps(qmodel, loader, val_loader, reestimate=2, ema=0.9, final_epoch="last")
    assert dq.evaluate(qmodel, val_loader).loss == result.history[-1]["val_loss"]
    first = qmodel.state_dict()["1.running_mean"].clone()
    other = make()
    steps(other, loader, val_loader, ema=0.9, final_epoch="last")
    assert torch.equal(other[0].weight, qmodel[0].weight)
    assert not torch.equal(first, other.state_dict()["1.running_mean"])


def test_statistics_freeze_at_their_step(make, loader):
    seen, _ = steps(make(), loader, batch_norm_freeze_at=0.7)  # 6 steps, so after 4
    means = [state["1.running_mean"] for state in seen]
    assert [torch.equal(a, b) for a, b in itertools.pairwise(means)] == [False, False, False, True, True]
    assert not torch.equal(seen[4]["1.weight"], seen[5]["1.weight"])


def test_fewshot_is_for_networks_without_batch_norm_too():
    qmodel = dq.quantize(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)), w_bits=4, a_bits=4)
    assert dq.finetune(qmodel, [torch.randn(8, 8)], recipe="fewshot", epochs=1, progress=False).epochs == 1


@pytest.mark.parametrize("options", [{"reestimate": 1}, {"batch_norm_freeze_at": 0.5}], ids=str)
def test_without_batch_norm_it_has_no_effect(options):
    qmodel = dq.quantize(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)), w_bits=4, a_bits=4)
    with pytest.raises(TrainingError, match=f"{next(iter(options))}: has no effect.*no batch norm"):
        dq.finetune(qmodel, [(torch.randn(8, 8), torch.zeros(8).long())], progress=False, **options)


@pytest.mark.slow
def test_a_compiled_model_has_whole_graphs_and_the_same_statistics(make):
    batches = [((torch.randn(16, 8),), {}) for _ in range(3)]
    plain = make().train()
    dq.calibrate(plain, [args[0] for args, _ in batches])
    compiled = make().train()
    compiled.load_state_dict(plain.state_dict())
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled.compile()
    compiled(*batches[0][0])
    compiled.load_state_dict(plain.state_dict())
    for model in (plain, compiled):
        reestimate(model, batches)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch.equal(plain[1].running_var, compiled[1].running_var)
    torch._dynamo.reset()
