"""One block and its examples; runs that start from rebuilt blocks."""

import logging

import pytest
import timm
import torch
from torch import nn

import daqconvert as dq
from daqconvert.models import float_copy
from daqconvert.posttraining.blocks import treats_rows_alone
from daqconvert.posttraining.reconstruction import Examples, fit
from helpers.block_networks import Net, Odd, error, images, low, trained_norms


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
    assert (batches, steps) == (8, 7)  # six batches an epoch
