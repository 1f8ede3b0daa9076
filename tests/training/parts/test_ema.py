import pytest
import torch
from torch import nn

import daqconvert as dq
from daqconvert.training import Recipe
from daqconvert.training.parts.ema import Average, _pairs
from daqconvert.training.parts.scheduled import set_site_bits
from daqconvert.training.run import Step


def state(model):
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def recorded(qmodel, loader, val_loader=None, **options):
    """The model's state after every step, and the result."""
    seen = []
    options = {"progress": False, "epochs": 3, "lr": 0.1, **options}
    result = dq.finetune(qmodel, loader(), val_loader, on_step=lambda step: seen.append(state(qmodel)), **options)
    return seen, result


@pytest.mark.parametrize("warmup", [True, False])
def test_it_is_its_formula_and_what_is_evaluated_and_kept(make, loader, val_loader, warmup):
    qmodel = make()
    seen, result = recorded(qmodel, loader, val_loader, ema=0.8, ema_warmup=warmup, final_epoch="last")
    average = {key: value.double() if value.is_floating_point() else value for key, value in seen[0].items()}
    for number, new in enumerate(seen[1:], 2):
        decay = min(0.8, 1 - number ** (-2 / 3)) if warmup else 0.8
        for key, value in new.items():
            floating = value.is_floating_point()
            average[key] = decay * average[key] + (1 - decay) * value if floating else value
    for key, value in qmodel.state_dict().items():
        torch.testing.assert_close(value.to(average[key].dtype), average[key], rtol=1e-4, atol=1e-6)  # sums of float32
    assert not torch.equal(qmodel[0].weight, seen[-1]["0.weight"])
    found = dq.evaluate(qmodel, val_loader)
    assert (found.top1, found.loss) == (result.history[-1]["val_top1"], result.history[-1]["val_loss"])


def test_training_does_not_see_it(make, loader, val_loader):
    plain, _ = recorded(make(), loader, val_loader)
    averaged, _ = recorded(make(), loader, val_loader, ema=0.9)
    assert len(plain) == len(averaged) == 9
    for ours, theirs in zip(averaged, plain, strict=True):
        assert all(torch.equal(ours[key], value) for key, value in theirs.items())


def test_the_best_checkpoint_is_an_average(make, loader, val_loader, tmp_path):
    qmodel = make()
    result = dq.finetune(qmodel, loader(), val_loader, ema=0.9, epochs=2, out_dir=tmp_path / "run", progress=False)
    best = make()
    dq.training.load_weights(best, result.best)
    row = result.history[result.best_epoch - 1]
    assert dq.evaluate(best, val_loader).loss == row["val_loss"]


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight


def alone(model, **options):
    recipe = Recipe(**options)
    part = Average(model, recipe.ema, warmup=recipe.ema_warmup)
    part.start()
    return part


def test_a_tensor_with_two_names_is_averaged_once():
    model = Tied()
    part = alone(model, ema=0.5, ema_warmup=False)
    part.after_step(Step(1, 9, 1, 0.0))
    before = model.a.weight.detach().clone()
    with torch.no_grad():
        model.a.weight.add_(1.0)
    part.after_step(Step(2, 9, 1, 0.0))
    torch.testing.assert_close(part.module.a.weight.detach(), before + 0.5)
    assert part.module.a.weight is part.module.b.weight
    assert len(_pairs(part.module, model)) == 3


def test_halves_are_averaged_in_float32():
    model = nn.Linear(4, 4).bfloat16()
    part = alone(model, ema=0.999, ema_warmup=False)
    part.after_step(Step(1, 9, 1, 0.0))
    with torch.no_grad():
        model.weight.add_(1.0)
    before = part.module.weight.detach().clone()
    part.after_step(Step(2, 9, 1, 0.0))
    assert part.module.weight.dtype == torch.float32
    assert not torch.equal(part.module.weight, before)  # 0.001 is lost in bfloat16
    with part.evaluating():
        assert torch.equal(model.weight, part.module.weight.bfloat16())
    assert not torch.equal(model.weight, part.module.weight.bfloat16())


class Replaced(nn.Module):
    """A model whose forward replaces its buffer, and whose state dict may have a tensor that is no attribute."""

    def __init__(self, computed):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.register_buffer("seen", torch.zeros(2))
        if computed:
            self.register_state_dict_post_hook(self.add)

    def forward(self):
        self.seen = self.seen + 1.0

    @staticmethod
    def add(module, state, prefix, metadata):
        state[f"{prefix}twice"] = 2 * module.seen


@pytest.mark.parametrize("computed", [False, True])
def test_a_buffer_that_is_replaced_is_followed(computed):
    model = Replaced(computed)
    part = alone(model, ema=0.5, ema_warmup=False)
    for number in range(1, 4):
        model()
        part.after_step(Step(number, 9, 1, 0.0))
    assert part.module.seen.tolist() == [2.25, 2.25]  # 1, then halfway to 2, then halfway to 3


def test_a_step_makes_no_state_dict(make, monkeypatch):
    qmodel = make()
    dq.calibrate(qmodel, [torch.randn(16, 8)])
    part = alone(qmodel, ema=0.9)
    part.after_step(Step(1, 9, 1, 0.0))
    monkeypatch.setattr(nn.Module, "state_dict", None)
    part.after_step(Step(2, 9, 1, 0.0))


def test_values_come_back_after_an_error(make):
    qmodel = make()
    dq.calibrate(qmodel, [torch.randn(16, 8)])
    part = alone(qmodel, ema=0.9)
    with torch.no_grad():
        qmodel[0].weight.add_(1.0)
    before = state(qmodel)
    with pytest.raises(ValueError, match="in between"), part.evaluating():
        assert not torch.equal(qmodel[0].weight, before["0.weight"])
        raise ValueError("in between")
    assert all(torch.equal(value, before[key]) for key, value in qmodel.state_dict().items())


def test_an_average_changes_its_bits_with_the_model(make):
    qmodel = make(2, normalize=False, grid="integer")
    dq.calibrate(qmodel, [torch.randn(16, 8)])
    part = alone(qmodel, ema=0.999, ema_warmup=False)
    part.after_step(Step(1, 9, 1, 0.0))
    site, twin = qmodel[4], part.module[4]
    set_site_bits(site, site.settings.replace(w_bits=4, a_bits=6))
    part.after_step(Step(2, 9, 1, 0.0))
    assert (twin.settings, twin.weight_quantizer.bits, twin.input_quantizer.bits) == (site.settings, 4, 6)
    for ours, theirs in zip(twin.parameters(), site.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)  # with the bounds of 2 bits they would be far away
