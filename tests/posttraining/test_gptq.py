"""GPTQ on whole networks, on the columns of one layer, and its solver against the definition."""

import logging

import pytest
import timm
import timm.layers
import torch
from torch import nn

import daqconvert as dq
from daqconvert.functional.products import ConvolutionProducts
from daqconvert.posttraining import block_names, choose_codes
from daqconvert.posttraining.gptq import (
    BLOCK,
    MOST_POSITIONS,
    columns,
    has_columns,
    output_error,
    second_moments,
    second_order_levels,
)
from helpers.block_networks import error, images


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.ReLU(),
        nn.Conv2d(16, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2, groups=2), nn.Flatten(), nn.Linear(200, 5),
    ).eval()  # fmt: skip


@pytest.mark.parametrize("w_bits", [3, 4])
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("grid", ["integer", "midrise"])
def test_outputs_are_nearer_and_weights_on_their_grid(w_bits, granularity, grid):
    model, x = network(), images(32)
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
    """The inputs of a layer are what the 2-bit layers before it give, quantized as this layer quantizes them."""
    model, x = network(), images(32)
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
    qmodel, x = dq.quantize(network(), w_bits=4, a_bits=8), images(32)
    dq.calibrate(qmodel, [x], progress=False)
    with pytest.raises(RuntimeError):
        choose_codes(qmodel, [x, x[:, :2]], [], show=False)
    assert all(m.enabled and m.watchers == () for m in qmodel if hasattr(m, "enabled"))


def test_finetune_starts_from_them_and_teaches_with_the_float_weights(caplog):
    model, x = network(), images(32)
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


# Columns: the rows of a weight times the columns of an input are the outputs.

LAYERS = {
    "linear": (nn.Linear(6, 4), (5, 6)),
    "linear over tokens": (nn.Linear(6, 4), (2, 3, 6)),
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 11)),
    "conv2d": (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (2, 4, 9, 8)),
    "pointwise": (nn.Conv2d(4, 6, 1), (2, 4, 5, 5)),
    "depthwise": (nn.Conv2d(4, 8, 5, padding=2, groups=4), (2, 4, 7, 7)),
    "reflected": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 6, 6)),
    "same": (timm.layers.Conv2dSame(4, 6, 3, stride=2), (2, 4, 7, 6)),
    "without a batch": (nn.Conv2d(4, 6, 3), (4, 6, 6)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_rows_times_columns_are_the_outputs(name):
    layer, shape = LAYERS[name]
    site = dq.quantize(nn.Sequential(layer), w_bits=4, a_bits=8)[0]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight = layer.weight.detach().double()
    operation = site.bare_operation()
    assert has_columns(operation)
    found = columns(operation, x, tuple(weight.shape))
    assert len(found) == getattr(layer, "groups", 1)
    products = (weight.reshape(len(found), -1, found.shape[1]) @ found).flatten(0, 1)  # (C_out, P)
    expected = operation(x, weight)
    if isinstance(layer, nn.Linear):
        expected = expected.reshape(-1, 4).t()
    else:
        expected = expected.reshape(-1, *expected.shape[-site.output_dims - 1 :]).transpose(0, 1).flatten(1)
    torch.testing.assert_close(products, expected, rtol=1e-12, atol=1e-12)


def test_large_images_are_thinned_out_evenly():
    conv = ConvolutionProducts((1, 1), (1, 1), (1, 1), 1)
    x = torch.arange(64.0 * 48).reshape(1, 1, 64, 48).repeat(2, 1, 1, 1)
    found = columns(conv, x, (1, 1, 3, 3))
    assert MOST_POSITIONS / 4 < found.shape[2] / 2 <= MOST_POSITIONS
    centres = found[0, 4, : found.shape[2] // 2]
    assert torch.equal(centres.diff().unique()[:1], torch.tensor([4.0]))  # every fourth pixel of a row
    tokens = columns(dq.functional.products.LinearProducts(), torch.randn(2, 2048, 3), (4, 3))
    assert tokens.shape == (1, 3, 2 * MOST_POSITIONS)


def test_others_have_none():
    site = dq.quantize(nn.Sequential(nn.ConvTranspose2d(4, 4, 2)), w_bits=4, a_bits=8)[0]
    assert not has_columns(site.bare_operation())
    assert not has_columns(lambda x, w: x @ w.t())


def test_half_precision_is_summed_in_float32():
    x = torch.full((1, 1, 70000), 1.0, dtype=torch.bfloat16)
    assert second_moments(x).item() == 70000.0


# The solver: after each column, the columns left are the exact minimum of the error.


def problem(groups=2, rows=3, inputs=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(groups, inputs, inputs, generator=generator, dtype=torch.float64)
    x = mixing @ torch.randn(groups, inputs, 4 * inputs, generator=generator, dtype=torch.float64)
    weight = torch.randn(groups, rows, inputs, generator=generator, dtype=torch.float64)
    step = 0.3 + torch.rand(groups, rows, generator=generator, dtype=torch.float64)
    return weight, x @ x.mT, step


def nearest(steps):
    return steps.round().clamp(-3, 3)


def by_definition(weight, own, step, damping):
    """One row at a time, columns by the size of their input: solve for what is left, round the next, and so on."""
    found = torch.empty_like(weight)
    for g, (rows, moments) in enumerate(zip(weight, own, strict=True)):
        order = moments.diagonal().argsort(descending=True, stable=True)
        moments = moments + damping * moments.diagonal().mean() * torch.eye(len(moments), dtype=moments.dtype)
        for r, row in enumerate(rows):
            fixed, values = [], []
            for i in range(len(row)):
                rest = order[i:]
                now = row[rest]
                if fixed:
                    missed = torch.stack(values) * step[g, r] - row[fixed]
                    now = now - torch.linalg.solve(moments[rest][:, rest], moments[rest][:, fixed] @ missed)
                fixed.append(int(order[i]))
                values.append(nearest(now[0] / step[g, r]))
            found[g, r, fixed] = torch.stack(values)
    return found


@pytest.mark.parametrize("inputs", [1, 5, BLOCK + 9])
def test_equals_the_definition(inputs):
    weight, own, step = problem(inputs=inputs, rows=2)
    found = second_order_levels(weight, own, step, nearest, damping=0.01)
    assert torch.equal(found, by_definition(weight, own, step, 0.01))


def test_outputs_are_nearer_than_with_the_nearest_levels():
    weight, own, step = problem(groups=1, rows=64, inputs=32)
    scale = step[:, :, None] / 4
    found = second_order_levels(weight, own, step / 4, torch.round, damping=0.01) * scale
    plain = (weight / scale).round() * scale
    assert output_error(found, weight, own) < 0.5 * output_error(plain, weight, own)


def test_independent_inputs_have_the_nearest_levels():
    weight, own, step = problem()
    alone = torch.diag_embed(own.diagonal(dim1=1, dim2=2))
    expected = nearest(weight / step[:, :, None])
    assert torch.equal(second_order_levels(weight, alone, step, nearest, damping=0.0), expected)


def test_inputs_that_are_always_zero_change_nothing_else():
    weight, own, step = problem(inputs=6)
    own[:, :, 2] = own[:, 2, :] = 0.0
    rest = [0, 1, 3, 4, 5]
    small = second_order_levels(weight[:, :, rest], own[:, rest][:, :, rest], step, nearest, damping=0.012)
    found = second_order_levels(weight, own, step, nearest, damping=0.0144)  # the same ridge: the mean is 5 / 6 of it
    assert torch.equal(found[:, :, rest], small)
    assert torch.equal(found[:, :, 2], nearest(weight[:, :, 2] / step))
    own.zero_()
    everything = second_order_levels(weight, own, step, nearest, damping=0.01)
    assert torch.equal(everything, nearest(weight / step[:, :, None]))
    assert output_error(everything, weight, own) == 0.0


@pytest.mark.parametrize("layer", [nn.Linear(6, 4), nn.Conv2d(6, 4, 3, groups=2)])
def test_empty_batches_have_no_moments(layer):
    x = torch.randn(16, 6) if isinstance(layer, nn.Linear) else torch.randn(4, 6, 5, 5)
    chosen = []
    for batches in ([x], [x, x[:0]]):
        qmodel = dq.quantize(nn.Sequential(layer), first=(4, 8), last=(4, 8))
        dq.calibrate(qmodel, [x])
        choose_codes(qmodel, batches, [], show=False)
        chosen.append(qmodel[0].weight)
    assert torch.equal(*chosen)
