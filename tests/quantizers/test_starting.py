"""Quantizers that change their width: bounds where they belong, nothing of the old width left."""

import math

import pytest
import torch
from torch import nn

import daqconvert as dq
from daqconvert.errors import PolicyError
from daqconvert.quantizers.starting import STD_CLIP, minimum_error_bound, normal_clip
from helpers.layer_steps import compiled


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("grid", ["midrise", "integer"])
def test_the_table_is_what_the_search_finds(bits, grid):
    rows = torch.randn(1, 200_000, dtype=torch.float64)
    top = 2**bits - 1 if grid == "midrise" else 2 ** (bits - 1) - 1
    assert normal_clip(top, grid == "midrise") == pytest.approx(minimum_error_bound(rows, bits, grid).item(), rel=0.06)


def test_one_bit_by_hand():
    assert normal_clip(1, True) == pytest.approx(math.sqrt(2 / math.pi), abs=0.01)
    found = 3 * torch.randn(10**6).relu().std().item()
    assert found == pytest.approx(STD_CLIP, rel=0.01)


def error(qmodel, model, x):
    return (qmodel(x) - model(x)).square().mean().item()


@torch.no_grad()
def set_bits(qmodel, w_bits, a_bits):
    for layer in qmodel.modules():
        if hasattr(layer, "weight_quantizer"):
            layer.settings = layer.settings.replace(w_bits=w_bits, a_bits=a_bits)
            layer.weight_quantizer.set_bits(w_bits)
            layer.input_quantizer.set_bits(a_bits)


@pytest.mark.parametrize(
    "settings",
    [
        {"grid": "integer"}, {"grid": "midrise", "normalize": False}, {"grid": "midrise", "normalize": True},
        {"rounding": "lsq"}, {"rounding": "ewgs", "normalize": False},
    ],
    ids=["integer", "midrise", "normalized", "lsq", "ewgs"],
)  # fmt: skip
def test_a_model_of_another_width_is_near_one_that_was_made_so(settings):
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3)).eval()
    x = torch.randn(8, 8, 10, 10)
    for layer in (model[0], model[2]):
        nn.init.normal_(layer.weight, std=0.1)

    def made(bits):
        both = {"w_bits": bits, "a_bits": bits}
        qmodel = dq.quantize(model, **settings, **both, first=both, last=both)
        dq.calibrate(qmodel, [x])
        return qmodel.eval()

    for before, after in ((2, 4), (3, 4), (8, 4), (4, 3)):
        qmodel, wanted = made(before), made(after)
        qmodel(x)  # a weight that is known is not quantized again
        set_bits(qmodel, after, after)
        if settings.get("normalize"):  # the output scale is for training to move
            for layer, other in zip(qmodel, wanted, strict=True):
                if hasattr(layer, "output_scale"):
                    layer.output_scale.data.copy_(other.output_scale)
        assert error(qmodel, model, x) < 2.5 * error(wanted, model, x), (before, after)
        assert torch.equal(dq.freeze(qmodel)(x), qmodel(x))
        layer, other = qmodel[2], wanted[2]
        assert layer.weight_quantizer.rounding == other.weight_quantizer.rounding
        assert layer.input_quantizer.rounding == other.input_quantizer.rounding
        assert layer.weight_quantizer.bits == layer.input_quantizer.bits == after


@compiled
def test_codes_of_the_old_width_are_forgotten():
    both = {"w_bits": 4, "a_bits": 4, "normalize": True, "grid": "midrise"}
    layer = dq.quantize(nn.Linear(16, 4), first=both, last=both)
    dq.calibrate(layer, [torch.randn(4, 16)])
    before = layer.weight_quantizer(layer.weight)
    layer.weight_quantizer.set_bits(2)
    assert before.abs().max() > 3 >= layer.weight_quantizer(layer.weight).abs().max()


def test_one_bit_inputs_and_back():
    both = {"w_bits": 4, "a_bits": 4}
    qmodel = dq.quantize(nn.Sequential(nn.ReLU(), nn.Linear(64, 4)), first=both, last=both)
    x = torch.randn(4096, 64)
    dq.calibrate(qmodel, [x])
    quantizer = qmodel[1].input_quantizer
    quantizer.set_bits(1)
    assert quantizer.upper.item() == pytest.approx(3 * x.relu().std().item(), rel=0.1)
    quantizer.set_bits(4)
    assert quantizer.upper.item() == pytest.approx(normal_clip(15, False), rel=0.1)


@pytest.mark.parametrize(
    ("settings", "which", "bits"),
    [
        ({}, "weight_quantizer", 1), ({}, "input_quantizer", 1), ({}, "weight_quantizer", 9),
        ({}, "input_quantizer", 2.0), ({"rounding": "lsq"}, "weight_quantizer", 1),
    ],
)  # fmt: skip
def test_impossible_widths(settings, which, bits):
    both = {"w_bits": 4, "a_bits": 4, **settings}
    layer = dq.quantize(nn.Linear(8, 4), first=both, last=both)
    dq.calibrate(layer, [torch.randn(4, 8)])
    with pytest.raises(PolicyError, match="expected an integer from"):
        getattr(layer, which).set_bits(bits)
    assert getattr(layer, which).bits == 4
