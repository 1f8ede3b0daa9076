"""Blocks learn their own outputs, from inputs that they will get; what cannot be trained that way says why."""

import logging

import pytest
import torch
from torch import nn

import daqconvert as dq
from daqconvert.models import float_copy
from daqconvert.posttraining import reconstruct
from daqconvert.posttraining.reconstruction import Examples, fit, trainable
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
    assert left == {"table", "one.bias", "two.bias"}


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


@pytest.mark.parametrize("rate", [1e6, 1e30])
def test_a_block_that_gets_worse_stays_as_it_was(rate, monkeypatch):
    monkeypatch.setattr("daqconvert.posttraining.reconstruction.RATE", rate)
    x = images()
    qmodel = low(trained_norms(Net(), x), x)
    qmodel.eval()
    block, y = qmodel.blocks[1], torch.randn(8, 8, 6, 6)
    examples = Examples([((y,), {})], [float_copy(qmodel).blocks[1](y)], whole=False)
    kept = {key: value.clone() for key, value in block.state_dict().items()}
    before, after = fit(block, examples, [block.two.weight], 5, torch.Generator(), lambda: None)
    assert before == after == examples.error(block) > 0
    assert all(torch.equal(value, kept[key]) for key, value in block.state_dict().items())


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
        names = [row.name for row in result.fitted.get("reconstruct", [])]
        assert names == ["blocks.0", "blocks.1", "blocks.2"][: 3 * (steps > 0)]
        assert ("reconstruct: 3 of 3, mean error 0." in str(result)) == (steps > 0)
        found.append(qmodel)
    plain, once, again = (error(qmodel, model, images(seed=1)) for qmodel in found)
    assert once == again < 0.8 * plain
    assert len(estimated) == 1  # blocks keep the statistics that they were trained with
    assert not caplog.records
    qmodel = low(Odd(), torch.randn(64, 6))
    with caplog.at_level(logging.WARNING):
        dq.finetune(qmodel, [torch.randn(8, 6)], **{**options, "features": (), "reestimate": 0}, reconstruct=2)
    assert "reconstruct: 2 of 3 blocks stay as they are: twice (a forward calls it 2 times)" in caplog.text


def test_a_resumed_run_and_its_report_know_what_was_fitted(tmp_path, monkeypatch):
    x = images()
    model = trained_norms(Net(), x)
    options = {"recipe": "fewshot", "epochs": 1, "progress": False, "gptq": 2, "reconstruct": 3, "out_dir": tmp_path}

    def run(**more):
        qmodel = low(model, x, grid="integer", normalize=False)
        return dq.finetune(qmodel, list(x.split(8)), **options, **more)

    fitted = run().fitted
    assert [row.name for row in fitted["reconstruct"]] == ["blocks.0", "blocks.1", "blocks.2"]
    assert len(fitted["gptq"]) > 3 and all(row.after <= row.before for row in fitted["gptq"])
    monkeypatch.setattr("daqconvert.training.parts.batch_norm._estimate", lambda *_: pytest.fail("estimated again"))
    assert run(resume=True).fitted == fitted
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "Blocks reconstructed" in page and "chosen by GPTQ" in page and "blocks.2" in page


def test_the_float_weights_teach_after_gptq_too(monkeypatch):
    x, seen = images(), []
    model = trained_norms(Net(), x)
    qmodel = low(model, x, grid="integer", normalize=False)

    def noted(qmodel, teacher, batches, blocks, steps, **_):
        seen.append((qmodel.blocks[0].one.weight.detach().clone(), teacher.blocks[0].one.weight, len(batches), steps))
        return []

    monkeypatch.setattr("daqconvert.training.preparing.reconstruct", noted)
    options = {"recipe": "fewshot", "epochs": 1, "progress": False, "reconstruct": 7, "reconstruct_batches": 8}
    dq.finetune(qmodel, list(x.split(8)), gptq=2, **options)
    ((chosen, taught, batches, steps),) = seen
    assert torch.equal(taught, model.blocks[0].one.weight) and not torch.equal(chosen, taught)
    assert (batches, steps) == (8, 7)  # more batches than the six of an epoch


def test_batches_without_inputs_are_passed_over():
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)) for _ in range(2)))
    x, none = torch.randn(64, 4), torch.zeros(0, 4)
    found = []
    for batches in ([x], [x, none]):
        qmodel = dq.quantize(model, w_bits=2, a_bits=4)
        dq.calibrate(qmodel, [x])
        rows = reconstruct(qmodel, float_copy(qmodel), batches, ["0", "1"], 5, show=False)
        found.append([row.before for row in rows])
    assert found[0][0] == found[1][0] and not any(row.left_alone for row in rows)
    rows = reconstruct(qmodel, float_copy(qmodel), [none], ["0", "1"], 5, show=False)
    assert [row.left_alone for row in rows] == ["it gets no inputs"] * 2
