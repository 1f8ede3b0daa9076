"""Blocks learn their own outputs, from inputs that they will get; what cannot be trained that way says why."""

import pytest
import torch
from torch import nn

from daqconvert.models import float_copy
from daqconvert.posttraining import block_names, reconstruct
from daqconvert.posttraining.blocks import BlockFlow, stages
from daqconvert.posttraining.reconstruction import trainable
from helpers.block_networks import Net, Odd, error, images, low, rebuilt, trained_norms


@pytest.mark.parametrize("settings", [{}, {"w_bits": 1, "a_bits": 2}, {"rounding": "lsq"}, {"rounding": "ste"}])
def test_held_out_outputs_are_nearer(settings):
    x, held_out = images(), images(seed=1)
    model = trained_norms(Net(), x)
    before = error(low(model, x, **settings), model, held_out)
    qmodel, rows = rebuilt(model, x, **settings)
    assert [row.name for row in rows] == ["blocks.0", "blocks.1", "blocks.2"]
    assert all(row.after < 0.9 * row.before and not row.left_alone for row in rows)
    assert error(qmodel, model, held_out) < 0.8 * before


def test_the_model_comes_back_as_it_was_but_for_its_blocks():
    x = images()
    model = trained_norms(Net(), x)
    plain = low(model, x)
    qmodel, _ = rebuilt(model, x)
    changed = {key.rpartition(".")[0] for key, value in qmodel.state_dict().items()
               if not torch.equal(value, plain.state_dict()[key])}  # fmt: skip
    assert changed and all(name.startswith("blocks.") for name in changed)
    assert all(parameter.grad is None for parameter in qmodel.parameters())
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in qmodel.modules())
    assert qmodel.training == plain.training
    assert all(module.momentum is None for module in qmodel.modules() if isinstance(module, nn.BatchNorm2d))


def test_inputs_carried_on_are_those_of_a_forward_and_are_not_spoiled_in_place():
    x = images()
    ways = [rebuilt(trained_norms(Net(inplace, detour), x), x, steps=10)[0].state_dict()
            for inplace, detour in ((False, False), (False, True), (True, False), (True, True))]  # fmt: skip
    for other in ways[1:]:
        assert all(torch.equal(value, other[key]) for key, value in ways[0].items())


def test_batch_norms_of_a_block_describe_what_it_gets(monkeypatch):
    monkeypatch.setattr("daqconvert.posttraining.reconstruction.fit", lambda *_: (1.0, 1.0))
    x, seen = images(), []
    qmodel, _ = rebuilt(trained_norms(Net(), x), x, w_bits=1, a_bits=2)
    norm = qmodel.eval().blocks[1].norm
    norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        qmodel(x)
    torch.testing.assert_close(norm.running_mean, seen[0].mean(dim=(0, 2, 3)), rtol=1e-4, atol=1e-5)


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


def test_weights_end_on_their_levels():
    x = images()
    qmodel, _ = rebuilt(trained_norms(Net(), x), x, steps=20, grid="integer", normalize=False)
    for block in qmodel.blocks:
        quantizer, weight = block.one.weight_quantizer, block.one.weight.detach()
        step = quantizer.scale().detach().reshape(-1, 1, 1, 1)
        assert torch.equal(quantizer(weight), (weight / step).round())
        torch.testing.assert_close((weight / step).round() * step, weight, rtol=1e-6, atol=0)


def test_what_is_trained():
    x = images()
    model = Net().eval()
    model.blocks[0].table = nn.Parameter(torch.ones(2, 2))
    qmodel = low(model, x)
    qmodel.blocks[0].one.bias.requires_grad_(False)
    shared = {id(qmodel.blocks[0].two.bias)}
    trained = {id(p) for p in trainable(qmodel.blocks[0], shared)}
    left = {name for name, p in qmodel.blocks[0].named_parameters() if id(p) not in trained}
    fixed = {"two.input_quantizer.lower"}  # of inputs that are never negative
    assert left == {"table", "one.bias", "two.bias"} | fixed


class Detour(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 6)
        self.a, self.twice, self.b = (nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)) for _ in range(3))

    def forward(self, x):
        return self.last(self.b(self.twice(self.twice(self.a(self.first(x))))))


def test_a_block_after_one_that_stays_gets_what_that_one_returns():
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    found = []
    for names in (["a", "twice", "b"], ["a", "b"]):
        qmodel = low(Detour(), x)
        rows = reconstruct(qmodel, float_copy(qmodel), [x], names, 10, show=False)
        found.append((rows[0], rows[-1], qmodel.b[0].weight.tolist()))
    assert found[0] == found[1]


def test_what_stays_as_it_is_says_why():
    torch.manual_seed(0)
    x = torch.randn(64, 6)
    qmodel = low(Odd(), x)
    kept = {name: value.clone() for name, value in qmodel.state_dict().items()}
    rows = reconstruct(qmodel, float_copy(qmodel), [x], ["twice", "pair", "tied", "never"], 30, show=False)
    assert {row.name: row.left_alone for row in rows} == {
        "twice": "a forward calls it 2 times", "pair": "it does not return one tensor of floating point", "tied": "",
    }  # fmt: skip
    changed = {key for key, value in qmodel.state_dict().items() if not torch.equal(value, kept[key])}
    assert "tied.0.weight" in changed and "tied.2.bias" in changed
    assert all(key.startswith("tied.") for key in changed) and "tied.2.weight" not in changed
