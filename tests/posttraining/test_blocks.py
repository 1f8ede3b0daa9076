"""The blocks of a model: their stages in a forward, and what they are called with."""

import timm
import torch
from torch import nn

from daqconvert.models import float_copy
from daqconvert.posttraining import block_names, reconstruct
from daqconvert.posttraining.blocks import BlockFlow, stages, treats_rows_alone
from daqconvert.posttraining.reconstruction import Examples
from helpers.block_networks import Net, images, low


def test_what_a_block_is_called_with():
    x = images(8)
    qmodel = low(Net().eval(), x)
    names = block_names(qmodel)
    found = stages(qmodel.eval(), x, [*names, "head"])
    assert [(stage.names, stage.chained) for stage in found] == [
        (["blocks.0"], False), (["blocks.1"], True), (["blocks.2"], True), (["head"], False)]  # fmt: skip
    flow = BlockFlow(qmodel, list(x.split(4)))
    flow.reach(found[1], None)
    with torch.no_grad():
        expected = qmodel.blocks[0](qmodel.stem(x[4:]))
    assert torch.equal(flow.calls[1][0][0], expected)
    assert torch.equal(flow.outputs()[1], qmodel.blocks[1](expected))


def test_a_batch_norm_goes_with_the_layer_before_it():
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(6)
    model = nn.Sequential(
        nn.Linear(6, 6), norm, nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 6), norm, nn.Linear(6, 2)
    ).eval()
    qmodel, x = low(model, torch.randn(64, 6)), torch.randn(64, 6)
    found = stages(qmodel, x, ["2", "5"])
    assert [(stage.names, stage.chained) for stage in found] == [(["2", "3"], False), (["5"], False)]
    rows = reconstruct(qmodel, float_copy(qmodel), [x], ["2", "5"], 40, show=False)
    assert [row.name for row in rows] == ["2", "5"] and rows[0].after < rows[0].before
    assert not torch.equal(qmodel[3].weight, torch.ones(6)) and torch.equal(norm.weight, torch.ones(6))


def test_rows_are_drawn_where_a_block_treats_them_alone():
    torch.manual_seed(0)
    layer = timm.create_model("test_vit").blocks[0].eval()
    x = torch.randn(6, 16, 64)
    assert treats_rows_alone(layer, ((x,), {}), layer(x))
    first = nn.MultiheadAttention(64, 4).eval()  # its first dimension is that of tokens

    class Tokens(nn.Module):
        def forward(self, x):
            return first(x, x, x)[0]

    assert not treats_rows_alone(Tokens(), ((x,), {}), Tokens()(x))
    mask = torch.ones(6, 1, 1)
    assert not treats_rows_alone(nn.Bilinear(4, 1, 2), ((torch.ones(6, 1, 4), mask), {}), torch.ones(6, 1, 2))

    class Fixed(nn.Module):
        def forward(self, x):
            return x.reshape(6, -1)

    assert not treats_rows_alone(Fixed(), ((x,), {}), Fixed()(x))
    examples = Examples([((x,), {})], [x.repeat(1, 1, 200)], whole=False)
    (rows, _), target = examples.draw(torch.Generator().manual_seed(0))
    assert len(rows[0]) == len(target) == 2 and torch.equal(rows[0].repeat(1, 1, 200), target)
    assert len(Examples(examples.calls, examples.targets, whole=True).draw(torch.Generator())[1]) == 6
