"""Whole networks: outputs get nearer, weights lie on their grid, and what is left alone says why."""

import logging

import pytest
import timm
import torch
from torch import nn

import daqconvert as dq
from daqconvert.posttraining import block_names, choose_codes
from daqconvert.posttraining.gptq import columns, second_moments, second_order_levels


def images(count=32, size=12):
    x = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))
    return x + x.roll(1, 2) + x.roll(1, 3)  # neighbours are alike, as in a photo


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.ReLU(),
        nn.Conv2d(16, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2, groups=2), nn.Flatten(), nn.Linear(200, 5),
    ).eval()  # fmt: skip


def error(qmodel, model, x):
    with torch.no_grad():
        return float((qmodel(x) - model(x)).square().mean() / model(x).square().mean())


@pytest.mark.parametrize("w_bits", [3, 4])
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("grid", ["integer", "midrise"])
def test_outputs_are_nearer_and_weights_on_their_grid(w_bits, granularity, grid):
    model, x = network(), images()
    qmodel = dq.quantize(model, w_bits=w_bits, a_bits=8, granularity=granularity, grid=grid, normalize=False)
    dq.calibrate(qmodel, x.split(8), progress=False)
    before = error(qmodel, model, images(64)[32:])
    rows = choose_codes(qmodel, list(x.split(8)), [], show=False)
    assert [row.name for row in rows] == ["0", "2", "4", "6", "8"]
    assert all(row.after < row.before and not row.left_alone for row in rows)
    assert error(qmodel, model, images(64)[32:]) < before
    for row in rows:
        site = qmodel.get_submodule(row.name)
        step = torch.as_tensor(site.weight_quantizer.scale()).reshape(-1, *[1] * (site.weight.dim() - 1))
        operand = site.weight_quantizer(site.weight)
        torch.testing.assert_close(operand * step, site.weight, rtol=1e-5, atol=1e-6)
        assert site.enabled and site.watchers == ()


def test_a_block_is_chosen_for_with_what_the_blocks_before_it_give():
    """With one layer a stage, inputs are what the 2-bit layers before it give, their inputs quantized too."""
    model, x = network(), images()
    qmodel = dq.quantize(model, w_bits=2, a_bits=2, grid="integer", normalize=False)
    dq.calibrate(qmodel, x.split(8), progress=False)
    choose_codes(qmodel, [x], [], show=False)
    site, seen = qmodel[4], []
    handle = site.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        qmodel(x)
    handle.remove()
    weight = model[4].weight.detach()
    grid = site.input_quantizer(seen[0]) * site.input_quantizer.scale()
    own = second_moments(columns(site.bare_operation(), grid, tuple(weight.shape)))
    step = site.weight_quantizer.scale().reshape(1, 8)
    expected = second_order_levels(weight.reshape(1, 8, 16), own, step, lambda v: v.round().clamp(-1, 1), 0.01)
    torch.testing.assert_close(
        site.weight.detach().double().reshape(1, 8, 16), expected * step[:, :, None].double(), rtol=1e-5, atol=1e-6
    )


def test_blocks_are_stages_and_the_model_comes_back_as_it_was():
    torch.manual_seed(0)
    model = timm.create_model("test_efficientnet", num_classes=7).train()
    qmodel, x = dq.quantize(model, w_bits=4, a_bits=8), images(16, 64)
    dq.calibrate(qmodel, [x], progress=False)
    norms = {key: value.clone() for key, value in qmodel.state_dict().items() if "running" in key}
    rows = choose_codes(qmodel, [x], block_names(qmodel), show=False)
    assert rows and not any(row.left_alone for row in rows)
    assert sum(row.after for row in rows) < 0.6 * sum(row.before for row in rows)
    assert qmodel.training and all(torch.equal(qmodel.state_dict()[key], value) for key, value in norms.items())


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.tied, self.other = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.other.weight = self.tied.weight
        self.made = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))
        self.up, self.never = nn.ConvTranspose1d(1, 1, 2, stride=2), nn.Linear(6, 6)

    def forward(self, x):
        x = self.made(self.other(self.tied(self.first(self.first(x)))))
        return self.up(x[:, None])


def test_what_is_left_alone_says_why():
    torch.manual_seed(0)
    qmodel = dq.quantize(Odd(), w_bits=4, a_bits=8)
    x = torch.randn(64, 6)
    dq.calibrate(qmodel, [x], progress=False)
    kept = {name: qmodel.get_submodule(name).weight.detach().clone() for name in ("tied", "made", "up")}
    rows = {row.name: row for row in choose_codes(qmodel, [x], [], show=False)}
    assert {name: row.left_alone for name, row in rows.items()} == {
        "first": "",  # called twice
        "tied": "shares its weight with another layer",
        "other": "shares its weight with another layer",
        "made": "its weight is computed from other parameters",
        "up": "it is neither linear nor a convolution of one or two dimensions, padded by numbers",
    }
    assert all(torch.equal(qmodel.get_submodule(name).weight, weight) for name, weight in kept.items())


def test_a_layer_that_fails_leaves_all_switched_on():
    qmodel, x = dq.quantize(network(), w_bits=4, a_bits=8), images()
    dq.calibrate(qmodel, [x], progress=False)
    with pytest.raises(RuntimeError):
        choose_codes(qmodel, [x, x[:, :2]], [], show=False)
    assert all(m.enabled and m.watchers == () for m in qmodel if hasattr(m, "enabled"))


def test_finetune_starts_from_them_and_teaches_with_the_float_weights(caplog):
    model, x = network(), images()
    qmodel = dq.quantize(model, w_bits=4, a_bits=8)
    options = {
        "recipe": "fewshot",
        "epochs": 1,
        "lr": 0.0,
        "quantizer_lr": 0.0,
        "reestimate": 0,
        "reconstruct": 0,
        "progress": False,
    }
    with caplog.at_level(logging.WARNING):
        dq.finetune(qmodel, list(x.split(8)), **options, gptq=2)
    plain = dq.quantize(model, w_bits=4, a_bits=8)
    dq.finetune(plain, list(x.split(8)), **options, gptq=0)
    assert error(qmodel, model, x) < 0.8 * error(plain, model, x)
    assert not caplog.records
    low = dq.quantize(model, w_bits=1, a_bits=8)
    with caplog.at_level(logging.WARNING):
        dq.finetune(low, list(x.split(8)), **options, gptq=2)
    assert "gptq: 3 of 5 layers keep the nearest levels of their weights: 2 (the grid of" in caplog.text
