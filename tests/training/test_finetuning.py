import csv
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import daqconvert as dq
from daqconvert.errors import DataError, FrozenError, TrainingError
from daqconvert.training import Recipe, evaluate, finetune, load_weights, recipe
from daqconvert.training.rundir import COLUMNS


def test_loss_falls_and_accuracy_rises(make_float, loader, val_loader):
    qmodel = dq.quantize(make_float(), w_bits=4, a_bits=4)  # random weights: everything is still to be learned
    result = finetune(qmodel, loader(), val_loader, epochs=12, lr=0.1, distill=0.0)
    losses = [row["train_loss"] for row in result.history]
    assert losses[-1] < 0.5 * losses[0]
    assert result.history[-1]["val_top1"] > 0.9 > 0.6 > evaluate(make_float(), val_loader).top1
    assert result.best_top1 == max(row["val_top1"] for row in result.history)
    assert result.history[result.best_epoch - 1]["val_top1"] == result.best_top1
    assert (result.epochs, result.out_dir, result.last, result.best) == (12, None, None, None)
    assert "12 epochs" in str(result)
    assert "best" in str(result)


def test_distillation_alone_needs_no_targets_and_nears_the_teacher(make_float, loader, val_loader):
    unlabelled = [x for x, _ in loader()]
    model = make_float()
    qmodel = dq.quantize(model, w_bits=3, a_bits=3)
    result = finetune(qmodel, unlabelled, epochs=8, lr=0.05, distill=1.0)
    losses = [row["train_loss"] for row in result.history]
    assert losses[-1] < 0.7 * losses[0]
    assert result.history[0]["train_top1"] is None
    assert (result.best_epoch, result.best_top1) == (None, None)


def test_the_model_is_trained_in_place_and_left_in_evaluation_mode(make, loader):
    qmodel = make().train()
    before = {name: p.detach().clone() for name, p in qmodel.named_parameters()}
    assert finetune(qmodel, loader(), epochs=1).calibration.batches == 3
    moved = {name for name, p in qmodel.named_parameters() if not torch.equal(p, before[name])}
    assert {"0.weight", "0.weight_quantizer.upper", "4.input_quantizer.upper", "6.output_scale"} <= moved
    assert not any(module.training for module in qmodel.modules())
    assert all(p.grad is None for p in qmodel.parameters())


def test_the_random_state_of_the_caller_is_given_back(make, loader):
    generator = torch.Generator().manual_seed(7)
    mine = loader(noise=0.1, generator=generator)
    random.seed(7)
    np.random.seed(7)
    before = (torch.get_rng_state(), generator.get_state(), random.getstate(), np.random.get_state()[1].copy())
    finetune(make(), mine, epochs=1)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.equal(generator.get_state(), before[1])
    assert random.getstate() == before[2]
    assert (np.random.get_state()[1] == before[3]).all()


@pytest.mark.parametrize("options", [{}, {"generator": torch.Generator()}], ids=["global", "generator"])
def test_the_seed_decides_everything(make, loader, options):
    runs = []
    for seed in (0, 0, 1):
        torch.randn(3)  # whatever ran before
        qmodel = make()
        finetune(qmodel, loader(noise=0.1, **options), epochs=1, seed=seed)
        runs.append(qmodel[0].weight.detach().clone())
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_samplers_and_data_sets_are_told_the_epoch(make, loader):
    sampler = torch.utils.data.DistributedSampler(loader().dataset, num_replicas=1, rank=0)
    batches = loader(shuffle=False, sampler=sampler)
    batches.dataset.set_epoch, told = lambda epoch: told.append((epoch, sampler.epoch)), []
    finetune(make(), batches, epochs=2)
    assert [epoch for epoch, _ in told] == [0, 1, 2]
    assert sampler.epoch == 2


@pytest.mark.parametrize(("mode", "moves"), [("train", True), ("freeze", False)])
def test_batch_norm(make, loader, mode, moves):
    qmodel = make()
    before = qmodel[1].running_mean.clone()
    finetune(qmodel, loader(), epochs=1, batch_norm=mode)
    assert torch.equal(qmodel[1].running_mean, before) != moves


def test_the_gradient_is_clipped(make, loader):
    def moved(**options):
        qmodel = make()
        before = qmodel[0].weight.detach().clone()
        finetune(qmodel, loader(), epochs=1, momentum=0.0, weight_decay=0.0, distill=0.0, **options)
        return (qmodel[0].weight.detach() - before).norm()

    assert moved(lr=0.1, clip_grad=1e-3) < 0.1 * 1e-3 * 3 * 1.01 < moved(lr=0.1)  # lr * norm * steps


def test_learning_rates_are_per_step(make, loader):
    history = finetune(make(), loader(), epochs=2, lr=0.4, quantizer_lr=0.2).history
    assert [row["step"] for row in history] == [3, 6]
    assert [row["lr"] for row in history] == pytest.approx([0.4 * 0.75, 0.4 * 0.0669873], rel=1e-5)  # steps 2, 5 of 6
    assert [row["quantizer_lr"] for row in history] == pytest.approx([0.2 * 0.75, 0.2 * 0.0669873], rel=1e-5)


def test_a_given_teacher_is_used_and_given_back(make, make_float, loader):
    torch.manual_seed(0)
    teacher = nn.Linear(8, 3).train()
    calls = []
    teacher.register_forward_hook(lambda module, args, out: calls.append((module.training, out.requires_grad)))
    finetune(make(), loader(), epochs=1, teacher=teacher)
    assert calls == [(False, False)] * 3
    assert teacher.training


def test_dict_batches_and_an_own_loss(loader):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 1)

        def forward(self, points, gain):
            return {"value": self.b(F.relu(self.a(points))).squeeze(1) * gain}

    batches = [{"points": x, "gain": 2.0, "target": x.sum(1)} for x, _ in loader(shuffle=False)]
    torch.manual_seed(0)
    qmodel = dq.quantize(Net(), w_bits=8, a_bits=8)
    loss = lambda outputs, target: F.mse_loss(outputs["value"], target)  # noqa: E731
    result = finetune(qmodel, batches, batches, loss_fn=loss, distill=0.0, epochs=6, lr=0.005)
    assert result.history[-1]["val_loss"] < 0.5 * result.history[0]["val_loss"]
    assert (result.best_top1, result.best_epoch) == (None, 6)  # the least loss
    with pytest.raises(TrainingError, match="expected one tensor of logits.*found a dict. Pass loss_fn="):
        finetune(qmodel, batches, distill=0.0)


def test_what_is_written(make, loader, val_loader, tmp_path, capsys):
    out, seen = tmp_path / "a" / "run", []
    result = finetune(make(), loader(), val_loader, epochs=2, out_dir=out, on_epoch=seen.append)
    names = ["best.safetensors", "checkpoints", "last.safetensors", "log.csv", "recipe.toml", "report.html"]
    names += ["snapshots.jsonl", "steps.csv", "teacher.safetensors", "tensorboard"]
    assert sorted(p.name for p in out.iterdir()) == names
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step-00000003.safetensors"]
    with (out / "log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == tuple(result.history[0]) == (*COLUMNS, "oscillating", "warnings")
    assert [{key: float(value) for key, value in row.items()} for row in rows] == result.history == seen
    assert recipe(out / "recipe.toml") == Recipe(epochs=2)
    assert (result.out_dir, result.last, result.best) == (out, out / names[2], out / names[0])
    assert capsys.readouterr() == ("", "")  # no terminal, no bar


def test_best_and_last_are_the_weights_they_say(make, loader, val_loader, tmp_path):
    states = []
    qmodel = make()
    keep = lambda row: states.append({k: v.clone() for k, v in qmodel.state_dict().items()})  # noqa: E731
    result = finetune(qmodel, loader(), val_loader, epochs=4, lr=0.3, distill=0.0, out_dir=tmp_path, on_epoch=keep)
    other = make()
    for path, epoch in ((result.last, 4), (result.best, result.best_epoch)):
        assert load_weights(other, path)["epochs_done"] == epoch
        assert all(torch.equal(value, states[epoch - 1][key]) for key, value in other.state_dict().items())


@pytest.mark.parametrize("kept", [True, False], ids=["out_dir", "in memory"])
@pytest.mark.parametrize("final", ["best", "last"])
def test_the_model_ends_with_the_epoch_that_the_recipe_says(make, loader, val_loader, tmp_path, final, kept):
    """The second epoch is the best one: in the third the last layer is turned round."""
    states = []
    qmodel = make()
    keep = lambda row: states.append({k: v.clone() for k, v in qmodel.state_dict().items()})  # noqa: E731
    options = {
        "epochs": 3,
        "lr": 0.1,
        "distill": 0.0,
        "final_epoch": final,
        "out_dir": tmp_path / "a" if kept else None,
    }

    @torch.no_grad()
    def spoil(step):
        if step.number == 9:
            qmodel[-1].weight.neg_()

    result = finetune(qmodel, loader(), val_loader, on_epoch=keep, on_step=spoil, **options)
    assert result.best_epoch < 3
    asked = states[result.best_epoch - 1 if final == "best" else -1]
    assert all(torch.equal(value, asked[key]) for key, value in qmodel.state_dict().items())
    if kept:  # a run that is resumed at its end leaves another model with the same weights
        again = make()
        finetune(again, loader(), val_loader, resume=True, **options)
        assert all(torch.equal(value, asked[key]) for key, value in again.state_dict().items())


def test_without_a_validation_loader_the_model_ends_with_the_last_epoch(make, loader, tmp_path):
    qmodel, other = make(), make()
    result = finetune(qmodel, loader(), epochs=2, lr=0.3, out_dir=tmp_path)
    load_weights(other, result.last)
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in qmodel.state_dict().items())


@pytest.mark.parametrize("bad", ["loss", "weight", "running_var"])
def test_nan_stops_and_leaves_the_last_good_checkpoint(make, loader, tmp_path, bad):
    """NaN appears in the loss, or in a weight or batch-norm statistic after the last step of an epoch only."""
    batches = list(loader(shuffle=False))
    qmodel, steps = make(), []

    def poison(module, args, output):
        if module.training and torch.is_grad_enabled():  # calibration sees training mode too, without gradients
            steps.append(0)
        if len(steps) == 5 and bad == "loss":
            return output * float("nan")
        if len(steps) == 6 and bad == "weight" and module.training:  # not the teacher's, which has the hook too
            output.register_hook(lambda grad: grad * float("inf"))
        return None

    def poison_statistics(parameter):  # the first layer's gradient comes last, so backward does not see it
        if len(steps) == 6 and bad == "running_var":
            qmodel[1].running_var.fill_(float("inf"))

    qmodel.register_forward_hook(poison)
    qmodel[0].weight.register_post_accumulate_grad_hook(poison_statistics)
    where = {"loss": "epoch 2, step 2 of 3: the loss is nan", "weight": "epoch 2: after it .* holds NaN"}
    where["running_var"] = "epoch 2: after it 1.running_var holds NaN or infinite"
    with pytest.raises(TrainingError, match=f"{where[bad]}.*holds the state after epoch 1.*Try a smaller lr"):
        finetune(qmodel, batches, epochs=3, out_dir=tmp_path)
    assert not qmodel.training
    fresh = make()
    assert load_weights(fresh, tmp_path / "last.safetensors")["epochs_done"] == 1
    assert all(torch.isfinite(value).all() for value in fresh.state_dict().values())


def test_guards_before_any_work(make, make_float, loader, tmp_path):
    qmodel, batches, out = make(), loader(), tmp_path / "run"
    dq.calibrate(qmodel, batches)
    with pytest.raises(FrozenError, match="frozen"):
        finetune(dq.freeze(qmodel), batches, out_dir=out)
    with pytest.raises(TrainingError, match="no quantized layer"):
        finetune(make_float(), batches, out_dir=out)
    with pytest.raises(TrainingError, match="meta device"):
        finetune(make().to("meta"), batches, out_dir=out)
    with pytest.raises(TrainingError, match="Nearest: paper-cifar10"):
        finetune(qmodel, batches, recipe="cifar10", out_dir=out)
    with pytest.raises(TrainingError, match="teacher: has no effect"):
        finetune(qmodel, batches, teacher=make_float(), distill=0.0, out_dir=out)
    with pytest.raises(TrainingError, match="teacher: shares parameters"):
        finetune(qmodel, batches, teacher=qmodel, out_dir=out)
    with pytest.raises(TrainingError, match="loss_fn: has no effect"):
        finetune(qmodel, batches, loss_fn=F.cross_entropy, distill=1.0, out_dir=out)
    with pytest.raises(TrainingError, match="need an out_dir"):
        finetune(qmodel, batches, resume=True)
    with pytest.raises(TrainingError, match="either resume=True"):
        finetune(qmodel, batches, out_dir=out, resume=True, overwrite=True)
    assert not out.exists()


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter([(torch.randn(8), torch.tensor(i % 3)) for i in range(40)])


def test_a_stream_without_length_trains_at_a_constant_rate(make):
    batches = torch.utils.data.DataLoader(Stream(), batch_size=16)
    with pytest.raises(TrainingError, match="has no length.*schedule"):
        finetune(make(), batches)
    history = finetune(make(), batches, schedule="constant", lr=0.1, warmup_steps=4, epochs=2).history
    assert [row["step"] for row in history] == [3, 6]
    assert [row["lr"] for row in history] == pytest.approx([0.1 * 3 / 5, 0.1])  # the warm-up does not start again


def test_a_loader_that_runs_dry(make, loader):
    class Once:
        def __init__(self):
            self.batches = list(loader())

        def __iter__(self):
            batches, self.batches = self.batches, []
            return iter(batches)

        def __len__(self):
            return 3

    qmodel = make()
    dq.calibrate(qmodel, loader())
    with pytest.raises(DataError, match="gave no batch in epoch 1"):
        finetune(qmodel, Once())


@pytest.mark.parametrize(
    "options",
    [
        {"weight_decay": 0.1, "quantizer_weight_decay": 0.1, "decay": "all", "ema": 0.5},
        {"gptq": 2, "reconstruct": 4},
        {"oscillation": "freeze", "oscillation_threshold": 0.0},
        {"lr_unit": "size", "optimizer": "adam", "lr": 0.1, "quantizer_lr": 0.1},
    ],
    ids=["decay and average", "gptq and reconstruction", "oscillation", "steps in sizes"],
)
def test_a_frozen_layer_stays_what_it_is(make_float, loader, options, caplog):
    qmodel = dq.quantize(make_float(), w_bits=3, a_bits=3, first=None, last=None)
    dq.calibrate(qmodel, [torch.stack([x for x, _ in loader().dataset])])
    qmodel[4].requires_grad_(False)
    before = {key: value.clone() for key, value in qmodel.state_dict().items()}
    finetune(qmodel, loader(), epochs=2, **options)
    assert not any(p.requires_grad for p in qmodel[4].parameters())
    for key, value in qmodel.state_dict().items():
        assert not key.startswith("4.") or torch.equal(value, before[key]), key
    assert not torch.equal(qmodel[6].weight, before["6.weight"])
    assert ("gptq" in options) is ("4 (its weight is frozen" in caplog.text)
