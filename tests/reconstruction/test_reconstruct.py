"""Blocks learn their own outputs, from inputs that they will get; what cannot be trained that way says why."""

import logging

import pytest
import timm
import torch
from torch import nn

import daqconvert as dq
from daqconvert.reconstruction import reconstruct
from daqconvert.reconstruction.calls import Flow, stages, treats_rows_alone
from daqconvert.reconstruction.fitting import Examples, fit, trainable
from daqconvert.training.objective import float_teacher
from daqconvert.training.objective.blocks import block_names


def images(count=48, size=12, seed=0):
    x = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))
    return x + x.roll(1, 2) + x.roll(1, 3)  # neighbours are alike, as in a photo


class Block(nn.Module):
    """Residual; its first operation is in place, as some networks have it."""

    def __init__(self, width, inplace=False):
        super().__init__()
        self.inplace = inplace
        self.one, self.norm = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.two = nn.Conv2d(width, width, 1)

    def forward(self, x):
        x = x.mul_(0.9) if self.inplace else x * 0.9
        return x + self.two(torch.relu(self.norm(self.one(x))))


class Net(nn.Module):
    """Blocks follow each other; `detour` puts something that changes nothing between them."""

    def __init__(self, inplace=False, detour=False):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.detour = nn.Conv2d(3, 8, 3), detour
        self.blocks = nn.ModuleList(Block(8, inplace) for _ in range(3))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x.clone() if self.detour else x)
        return self.head(x.mean(dim=(2, 3)))


def trained_norms(model, x):
    """Statistics of its own data, as a trained network has them."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        model.train()(x)
    return model.eval()


def low(model, x, **settings):
    qmodel = dq.quantize(model, **{"w_bits": 2, "a_bits": 4, **settings})
    dq.calibrate(qmodel, [x], progress=False)
    return qmodel


def error(qmodel, model, x):
    with torch.no_grad():
        return float((qmodel.eval()(x) - model(x)).square().mean() / model(x).square().mean())


def rebuilt(model, x, steps=60, batch=16, **settings):
    qmodel = low(model, x, **settings)
    names = block_names(qmodel)
    return qmodel, reconstruct(qmodel, float_teacher(qmodel), list(x.split(batch)), names, steps, show=False)


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
    monkeypatch.setattr("daqconvert.reconstruction.reconstructing.fit", lambda *_: (1.0, 1.0))
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
    flow = Flow(qmodel, list(x.split(4)))
    flow.reach(found[1], None)
    with torch.no_grad():
        expected = qmodel.blocks[0](qmodel.stem(x[4:]))
    assert torch.equal(flow.calls[1][0][0], expected)
    assert torch.equal(flow.outputs()[1], qmodel.blocks[1](expected))


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.twice = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
        self.pair = Pair()
        self.tied = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
        self.never = nn.Linear(6, 6)
        self.last = nn.Linear(6, 6)
        self.last.weight = self.tied[2].weight

    def forward(self, x):
        return self.last(self.tied(sum(self.pair(self.twice(self.twice(self.first(x)))))))


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.one(x), self.two(x)


def test_a_batch_norm_goes_with_the_layer_before_it():
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(6)
    model = nn.Sequential(
        nn.Linear(6, 6), norm, nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 6), norm, nn.Linear(6, 2)
    ).eval()
    qmodel, x = low(model, torch.randn(64, 6)), torch.randn(64, 6)
    found = stages(qmodel, x, ["2", "5"])
    assert [(stage.names, stage.chained) for stage in found] == [(["2", "3"], False), (["5"], False)]
    rows = reconstruct(qmodel, float_teacher(qmodel), [x], ["2", "5"], 40, show=False)
    assert [row.name for row in rows] == ["2", "5"] and rows[0].after < rows[0].before
    assert not torch.equal(qmodel[3].weight, torch.ones(6)) and torch.equal(norm.weight, torch.ones(6))


def test_weights_end_on_their_levels():
    x = images()
    qmodel, _ = rebuilt(trained_norms(Net(), x), x, steps=20, grid="integer", normalize=False)
    for block in qmodel.blocks:
        quantizer, weight = block.one.weight_quantizer, block.one.weight.detach()
        step = quantizer.multiplier().detach().reshape(-1, 1, 1, 1)
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
        rows = reconstruct(qmodel, float_teacher(qmodel), [x], names, 10, show=False)
        found.append((rows[0], rows[-1], qmodel.b[0].weight.tolist()))
    assert found[0] == found[1]


def test_what_stays_as_it_is_says_why():
    torch.manual_seed(0)
    x = torch.randn(64, 6)
    qmodel = low(Odd(), x)
    kept = {name: value.clone() for name, value in qmodel.state_dict().items()}
    rows = reconstruct(qmodel, float_teacher(qmodel), [x], ["twice", "pair", "tied", "never"], 30, show=False)
    assert {row.name: row.left_alone for row in rows} == {
        "twice": "a forward calls it 2 times", "pair": "it does not return one tensor of floating point", "tied": "",
    }  # fmt: skip
    changed = {key for key, value in qmodel.state_dict().items() if not torch.equal(value, kept[key])}
    assert "tied.0.weight" in changed and "tied.2.bias" in changed
    assert all(key.startswith("tied.") for key in changed) and "tied.2.weight" not in changed


@pytest.mark.parametrize("rate", [1e6, 1e30])
def test_a_block_that_gets_worse_stays_as_it_was(rate, monkeypatch):
    monkeypatch.setattr("daqconvert.reconstruction.fitting.RATE", rate)
    x = images()
    qmodel = low(trained_norms(Net(), x), x)
    qmodel.eval()
    block, y = qmodel.blocks[1], torch.randn(8, 8, 6, 6)
    examples = Examples([((y,), {})], [float_teacher(qmodel).blocks[1](y)], whole=False)
    kept = {key: value.clone() for key, value in block.state_dict().items()}
    before, after = fit(block, examples, [block.two.weight], 5, torch.Generator(), lambda: None)
    assert before == after == examples.error(block) > 0
    assert all(torch.equal(value, kept[key]) for key, value in block.state_dict().items())


def test_rows_are_drawn_where_a_block_treats_them_alone():
    torch.manual_seed(0)
    layer = timm.create_model("test_vit").blocks[0].eval()
    x = torch.randn(6, 16, 64)
    assert treats_rows_alone(layer, ((x,), {}), layer(x))
    first = nn.MultiheadAttention(64, 4).eval()  # its first dimension are tokens

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


def test_finetune_starts_from_rebuilt_blocks_and_says_which_are_not(caplog, monkeypatch):
    estimated = []
    monkeypatch.setattr("daqconvert.training.parts.batch_norm._estimate", lambda run, *_: estimated.append(run))
    x = images()
    model = trained_norms(Net(), x)
    options = {"recipe": "fewshot", "epochs": 1, "lr": 0.0, "quantizer_lr": 0.0, "progress": False}
    found = []
    for steps in (0, 40, 40):
        qmodel = low(model, x)
        with caplog.at_level(logging.WARNING):
            result = dq.finetune(qmodel, list(x.split(8)), **options, reconstruct=steps, reconstruct_batches=9)
        assert [row.name for row in result.reconstructed] == ["blocks.0", "blocks.1", "blocks.2"][: 3 * (steps > 0)]
        assert ("3 blocks reconstructed, mean error 0." in str(result)) == (steps > 0)
        found.append(qmodel)
    plain, once, again = (error(qmodel, model, images(seed=1)) for qmodel in found)
    assert once == again < 0.8 * plain
    assert len(estimated) == 1  # blocks keep the statistics that they were trained with
    assert not caplog.records
    qmodel = low(Odd(), torch.randn(64, 6))
    with caplog.at_level(logging.WARNING):
        dq.finetune(qmodel, [torch.randn(8, 6)], **{**options, "features": (), "reestimate": 0}, reconstruct=2)
    assert "reconstruct: 2 of 3 blocks stay as they are: twice (a forward calls it 2 times)" in caplog.text


def test_the_float_weights_teach_after_gptq_too(monkeypatch):
    x, seen = images(), []
    model = trained_norms(Net(), x)
    qmodel = low(model, x, grid="integer", normalize=False)

    def noted(qmodel, teacher, batches, blocks, steps, **_):
        seen.append((qmodel.blocks[0].one.weight.detach().clone(), teacher.blocks[0].one.weight, len(batches), steps))
        return []

    monkeypatch.setattr("daqconvert.training.rebuilding.reconstruct", noted)
    options = {"recipe": "fewshot", "epochs": 1, "progress": False, "reconstruct": 7, "reconstruct_batches": 8}
    dq.finetune(qmodel, list(x.split(8)), gptq=2, **options)
    ((chosen, taught, batches, steps),) = seen
    assert torch.equal(taught, model.blocks[0].one.weight) and not torch.equal(chosen, taught)
    assert (batches, steps) == (8, 7)  # six batches an epoch
