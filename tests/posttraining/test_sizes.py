"""The size of a parameter, and steps in units of it."""

import pytest
import torch
from torch import nn

import daqconvert as dq
from daqconvert.posttraining.sizes import parameter_sizes, step_in_sizes


def middle(layer, x, **settings):
    """Put a layer between two others, because the first and the last have 8 bits, and quantize all."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Identity(), nn.Linear(512, 512), layer, nn.Linear(512, 2)).eval()
    qmodel = dq.quantize(model, **{"w_bits": 4, "a_bits": 4, **settings})
    dq.calibrate(qmodel, [x], progress=False)
    return qmodel


def test_of_a_weight_it_is_the_step_of_each_channel():
    torch.manual_seed(0)
    layer = nn.Linear(512, 512)
    nn.init.normal_(layer.weight)
    layer.weight.data *= torch.logspace(-4, 0, 512)[:, None]
    qmodel = middle(layer, torch.randn(8, 512))
    site, found = qmodel[2], parameter_sizes(qmodel)
    assert set(found) == set(qmodel.parameters())
    step = site.weight_quantizer.scale().detach()
    ratio = found[site.weight] / step[:, None]
    assert 0.7 < float(ratio.min()) < float(ratio.max()) < 1.4
    assert torch.equal(found[site.weight_quantizer.upper], 0.1 * site.weight_quantizer.upper.detach())
    assert torch.equal(found[site.output_scale], 0.1 * site.output_scale.detach())
    assert float(found[site.bias]) == pytest.approx(0.1 * float(site.bias.detach().square().mean().sqrt()))


@pytest.mark.parametrize("settings", [{"granularity": "tensor"}, {"w_bits": 1}, {"rounding": "lsq"}])
def test_one_bound_is_one_size(settings):
    qmodel = middle(nn.Linear(512, 512), torch.randn(8, 512), **settings)
    size = parameter_sizes(qmodel)[qmodel[2].weight]
    assert (len(size.unique()) == 1) == (not qmodel[2].weight_quantizer.per_channel)


def test_of_a_transposed_convolution_it_is_per_output_channel():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ConvTranspose1d(4, 6, 2, groups=2), nn.Linear(8, 2))
    site = dq.quantize(model, w_bits=4, a_bits=4)[1]
    rows = site.weight_quantizer.layout.rows(parameter_sizes(site)[site.weight])
    assert rows.shape == (6, 4) and all(len(row.unique()) == 1 for row in rows) and len(rows.unique()) == 6


def test_zeros_have_the_size_of_one():
    norm = nn.LayerNorm(4)
    assert parameter_sizes(norm)[norm.bias] == pytest.approx(0.1) == parameter_sizes(norm)[norm.weight]


def test_a_step_is_so_many_sizes():
    layer = nn.Linear(3, 2)
    before = {p: p.detach().clone() for p in layer.parameters()}
    layer(torch.ones(1, 3)).sum().backward()
    sizes = {layer.weight: torch.tensor([[1.0], [100.0]]), layer.bias: torch.tensor(0.5)}
    step_in_sizes(torch.optim.Adam(layer.parameters(), lr=0.01), sizes)
    moved = {p: before[p] - p.detach() for p in layer.parameters()}  # Adam's first step is the learning rate
    torch.testing.assert_close(moved[layer.weight], torch.tensor([[0.01], [1.0]]).expand(2, 3), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(moved[layer.bias], torch.tensor([0.005, 0.005]), rtol=1e-4, atol=1e-6)


def test_finetune_moves_small_channels_as_far_as_large_ones():
    torch.manual_seed(0)
    x = torch.randn(64, 8)
    layer = nn.Linear(8, 512)
    layer.weight.data *= torch.logspace(-3, 0, 512)[:, None]
    qmodel = dq.quantize(nn.Sequential(nn.Linear(8, 8), layer, nn.Linear(512, 2)), w_bits=4, a_bits=8)
    dq.calibrate(qmodel, [x], progress=False)
    before, size = qmodel[1].weight.detach().clone(), parameter_sizes(qmodel)[qmodel[1].weight]
    dq.finetune(qmodel, [(x, torch.randint(2, (64,)))] * 4, epochs=1, optimizer="adam", lr=0.01, lr_unit="size",
                weight_decay=0.0, progress=False)  # fmt: skip
    moved = ((qmodel[1].weight.detach() - before) / size).abs().mean(dim=1)
    assert float(moved.min()) > 0.001
    assert float(moved.max()) < 0.04
