"""What changes in the course of a run: bits, the slope of rounding, whether bounds are trained; and early stopping."""

import pytest
import torch
from torch import nn

import daqconvert as dq
from daqconvert.errors import TrainingError
from daqconvert.functional.grid import Rounding
from daqconvert.models import quantized_sites
from daqconvert.quantizers.base import Quantizer
from daqconvert.training.optim import parameter_groups
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


# -------------------------------------------------------------------------------------------------------------- bounds


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "lamb"])
def test_bounds_stay_where_they_are_from_their_step_on(make, loader, optimizer):
    qmodel, seen = make(), []
    dq.finetune(
        qmodel, loader(), epochs=2, freeze_bounds_at=0.5, quantizer_lr=0.01, quantizer_optimizer=optimizer,
        quantizer_weight_decay=0.1, clip_grad=1.0, progress=False,
        on_step=lambda step: seen.append({k: v.detach().clone() for k, v in qmodel.state_dict().items()}),
    )  # fmt: skip
    groups = parameter_groups(qmodel)

    def moved(group, i):
        return [k for k in groups[group] if not torch.equal(seen[i][k], seen[i - 1][k])]

    assert [bool(moved("quantizers", i)) for i in range(1, 6)] == [True, True, False, False, False]
    assert all(moved("weights", i) for i in range(1, 6))


@pytest.mark.parametrize("field", ["freeze_bounds_at", "batch_norm_freeze_at"])
def test_a_share_of_an_unknown_length_is_an_error(make, loader, field):
    class Stream:
        def __iter__(self):
            return iter(loader())

    with pytest.raises(TrainingError, match=f"{field}: is a share of the run, and train_loader has no length"):
        dq.finetune(make(), Stream(), epochs=1, schedule="constant", progress=False, **{field: 0.5})


# ------------------------------------------------------------------------------------------------------------ stopping


def test_it_stops_when_nothing_was_better_for_a_while(make, loader, val_loader):
    still = {"lr": 0.0, "quantizer_lr": 0.0, "batch_norm": "freeze"}  # every epoch is as good as the first
    result = dq.finetune(make(), loader(), val_loader, epochs=9, patience=2, progress=False, **still)
    assert (result.epochs, result.best_epoch) == (3, 1)
    assert "no epoch was better than epoch 1 for 2 epochs" in str(result)


def test_it_goes_on_while_there_is_progress(make, loader, val_loader):
    result = dq.finetune(make(8), loader(), val_loader, epochs=4, patience=3, lr=0.01, progress=False)
    assert result.epochs == 4


def test_a_stopped_run_is_not_resumed(make, loader, val_loader, tmp_path):
    still = {"lr": 0.0, "quantizer_lr": 0.0, "batch_norm": "freeze", "epochs": 9, "patience": 1, "progress": False}
    first = dq.finetune(make(), loader(), val_loader, out_dir=tmp_path / "run", **still)
    again = dq.finetune(make(), loader(), val_loader, out_dir=tmp_path / "run", resume=True, **still)
    assert (first.epochs, again.epochs) == (2, 2)


def test_patience_needs_something_to_look_at(make, loader):
    with pytest.raises(TrainingError, match="patience: needs a val_loader"):
        dq.finetune(make(), loader(), epochs=2, patience=1, progress=False)


# ---------------------------------------------------------------------------------------------------------- sharpening


def roundings(qmodel):
    return [module.rounding for module in qmodel.modules() if isinstance(module, Quantizer)]


def low(make, bits=2, **settings):
    """Return a model whose first layer has few bits too, so that its roundings are the first ones."""
    return make(bits=bits, first=(bits, bits), **settings)


def short_run(qmodel, data, seen=None, **options):
    sharp = {"final_w_sigma": 2.0, "final_a_sigma": 2.0, "final_sigma_bits": 2}
    options = {"epochs": 2, "progress": False, **sharp, **options}
    return dq.finetune(
        qmodel, data, on_step=lambda step: seen is not None and seen.append(roundings(qmodel)), **options
    )


def test_the_kernel_widens_from_its_own_width_to_the_final_one(make, loader):
    qmodel, seen = low(make, w_sigma=0.5, a_sigma=0.5, slope="unit"), []
    own = roundings(qmodel)
    short_run(qmodel, loader(), seen, final_w_sigma=1.0)
    for i, (weights, inputs, *_) in enumerate(seen):
        share = (100 * i // len(seen)) / 100
        for found, way in ((weights, 0.5), (inputs, 1.5)):
            assert found.numbers == pytest.approx(Rounding.make("daq", 2.0, 0.5 + way * share, True).numbers)
    assert roundings(qmodel) == own


def test_the_final_width_counts(make, loader):
    results = []
    for options in ({"final_w_sigma": 0.0}, {}, {"final_a_sigma": 0.0}, {"final_a_sigma": 0.0, "final_w_sigma": 0.0}):
        qmodel = low(make, a_sigma=0.5, w_sigma=0.5, slope="unit")
        short_run(qmodel, loader(), **options)
        results.append([p.detach().clone() for p in qmodel.parameters()])
    for i in range(len(results)):
        assert not all(torch.equal(a, b) for a, b in zip(results[i], results[i - 1], strict=True))


@pytest.mark.parametrize("rounding", ["ste", "ewgs", "dsq"])
def test_other_roundings_are_left_alone(make, loader, rounding):
    qmodel, seen = low(make, rounding=rounding), []
    own = roundings(qmodel)
    short_run(qmodel, loader(), seen)
    assert all(step == own for step in seen)


def test_a_run_of_unknown_length_and_operands_of_more_bits_keep_their_own(make, loader):
    class Stream:
        def __iter__(self):
            return iter(loader())

    for qmodel, data, bits in ((low(make), Stream(), 2), (low(make), loader(), 1), (low(make, bits=3), loader(), 2)):
        own, seen = roundings(qmodel), []
        short_run(qmodel, data, seen, schedule="constant", final_sigma_bits=bits)
        assert seen
        assert all(step == own for step in seen)


def test_the_bits_of_the_plan_decide_not_those_of_a_stage(make, loader):
    qmodel, seen = low(make), []
    short_run(qmodel, loader(), seen, progressive=[[0.5, 4, 4]])
    assert seen[1][1] != seen[0][1]


def test_own_roundings_come_back_after_an_exception(make, loader):
    qmodel = low(make)
    own = roundings(qmodel)

    def stop(step):
        if step.number == 4:
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        dq.finetune(qmodel, loader(), epochs=3, final_a_sigma=2.0, final_sigma_bits=2, on_step=stop, progress=False)
    assert roundings(qmodel) == own


@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv2d])
def test_compiled_models_see_the_change_without_another_compilation(kind):
    from torch._dynamo.utils import counters

    torch.manual_seed(0)
    layer = nn.Linear(6, 4) if kind is nn.Linear else nn.Conv2d(3, 4, 3)
    shape = (8, 6) if kind is nn.Linear else (2, 3, 8, 8)
    options = {"w_bits": 2, "a_bits": 2, "first": (2, 2), "last": (2, 2)}
    eager = dq.quantize(nn.Sequential(nn.Identity(), layer, nn.ReLU()), **options)
    x = torch.randn(shape).relu()
    dq.calibrate(eager, [(x,)])
    compiled = dq.quantize(nn.Sequential(nn.Identity(), layer, nn.ReLU()), **options)
    compiled.load_state_dict(eager.state_dict())
    torch._dynamo.reset()
    compiled.compile()
    graphs = []
    for sigma in (0.5, 1.0, 2.0, 3.0):
        gradients = []
        for model in (eager, compiled):
            for module in model.modules():
                if isinstance(module, Quantizer):
                    module.rounding = Rounding.make("daq", 2.0, sigma, True)
            inputs = x.clone().requires_grad_()
            model.zero_grad()
            model(inputs).square().sum().backward()
            gradients.append([inputs.grad, *(p.grad for p in model.parameters() if p.grad is not None)])
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        graphs.append(counters["stats"]["unique_graphs"])
    assert len(set(graphs)) == 1
