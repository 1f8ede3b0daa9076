import pytest
import torch
from torch import nn

import daqconvert as dq
from daqconvert.models import quantized_sites
from daqconvert.training.parts.scheduled import ProgressiveBits

STAGES = [[0.4, 4, 6], [0.7, 3, 2]]  # of 9 steps: 3, then 3 more


def bits(site):
    found = tuple(None if q is None else q.bits for q in (site.weight_quantizer, site.input_quantizer))
    if site.weight_quantizer is not None:
        assert site.settings.w_bits == found[0]
    if site.input_quantizer is not None:
        assert site.settings.a_bits == found[1]
    return found


def train(qmodel, loader, val_loader=None, **options):
    seen = []
    options = {"epochs": 3, "progressive": STAGES, "progress": False, **options}
    return seen, dq.finetune(
        qmodel, loader(), val_loader, **options,
        on_step=lambda step: seen.append({name: bits(site) for name, site in quantized_sites(qmodel).items()}),
    )  # fmt: skip


def test_a_site_has_the_more_bits_of_its_own_and_the_stages(make, loader, val_loader):
    qmodel = make(2)
    plan = {name: site.settings for name, site in quantized_sites(qmodel).items()}
    seen, result = train(qmodel, loader, val_loader)
    assert [found["4"] for found in seen] == [(4, 6)] * 3 + [(3, 2)] * 3 + [(2, 2)] * 3
    assert {found["0"] for found in seen} == {(8, 8)}  # first and last have 8
    assert {name: site.settings for name, site in quantized_sites(qmodel).items()} == plan
    assert result.best_epoch == 3  # what had more bits was another model
    dq.freeze(qmodel)


def test_the_last_step_has_the_plans_bits(make, loader):
    seen, _ = train(make(2), loader, progressive=[[0.999, 8, 8]])
    assert [found["4"] for found in seen] == [(8, 8)] * 8 + [(2, 2)]


def test_float_operands_stay_float(make_float, loader):
    qmodel = dq.quantize(make_float(), w_bits=2, a_bits=None, first=None, last=None)
    seen, _ = train(qmodel, loader)
    assert [found["4"] for found in seen] == [(4, None)] * 3 + [(3, None)] * 3 + [(2, None)] * 3


@pytest.mark.parametrize("settings", [{"rounding": "lsq"}, {"deploy": "integer"}, {"share_inputs": True}], ids=str)
def test_other_quantizers_step_down_too(make, loader, settings):
    qmodel = make(3, **settings)
    before = {name: bits(site) for name, site in quantized_sites(qmodel).items()}
    seen, _ = train(qmodel, loader, progressive=[[0.5, 6, 6]], ema=0.9, reestimate=1)
    for name, own in before.items():
        assert seen[0][name] == tuple(None if b is None else max(b, 6) for b in own)
        assert seen[-1][name] == own
    assert before == {name: bits(site) for name, site in quantized_sites(qmodel).items()}


def test_attention_products_step_down_too():
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    qmodel = dq.quantize(
        nn.Sequential(block, nn.Flatten(), nn.Linear(32, 3)), w_bits=4, a_bits=4, attention=4, first=None, last=None
    )
    sites, seen = quantized_sites(qmodel), []
    assert any(site.float_weight() is None for site in sites.values())  # products of two activations
    dq.finetune(
        qmodel, [(torch.randn(6, 4, 8), torch.arange(6) % 3) for _ in range(2)], epochs=1, progressive=[[0.5, 8, 6]],
        progress=False, on_step=lambda step: seen.append([bits(site) for site in sites.values()]),
    )  # fmt: skip
    assert set(seen[0]) - {(None, None)} == {(8, 6)}
    assert set(seen[1]) - {(None, None)} == {(4, 4)}


def test_the_plan_is_back_after_an_error(make, loader):
    def fail(step):
        raise RuntimeError("in a stage")

    qmodel = make(2)
    with pytest.raises(RuntimeError, match="in a stage"):
        dq.finetune(qmodel, loader(), epochs=3, progressive=STAGES, progress=False, on_step=fail)
    assert bits(qmodel[4]) == (2, 2)


def test_the_stage_of_a_step():
    part = ProgressiveBits(None, STAGES)
    part._ends = [3, 6]
    assert [part.stage_of(number) for number in range(1, 9)] == [0, 0, 0, 1, 1, 1, 2, 2]
