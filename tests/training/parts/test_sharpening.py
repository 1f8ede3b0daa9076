import pytest
import torch
from torch import nn

import daqconvert as dq
from daqconvert.functional.grid import Rounding
from daqconvert.quantizers.base import Quantizer


def roundings(qmodel):
    return [module.rounding for module in qmodel.modules() if isinstance(module, Quantizer)]


def low(make, bits=2, **settings):
    """A model whose first layer has few bits as well: its roundings come first."""
    return make(bits=bits, first=(bits, bits), **settings)


def train(qmodel, data, seen=None, **options):
    sharp = {"final_w_sigma": 2.0, "final_a_sigma": 2.0, "final_sigma_bits": 2}
    options = {"epochs": 2, "progress": False, **sharp, **options}
    return dq.finetune(
        qmodel, data, on_step=lambda step: seen is not None and seen.append(roundings(qmodel)), **options
    )


def test_the_kernel_widens_from_its_own_width_to_the_final_one(make, loader):
    qmodel, seen = low(make, w_sigma=0.5, a_sigma=0.5, slope="unit"), []
    own = roundings(qmodel)
    train(qmodel, loader(), seen, final_w_sigma=1.0)
    for i, (weights, inputs, *_) in enumerate(seen):
        share = (100 * i // len(seen)) / 100
        for found, way in ((weights, 0.5), (inputs, 1.5)):
            assert found.numbers == pytest.approx(Rounding.make("daq", 2.0, 0.5 + way * share, True).numbers)
    assert roundings(qmodel) == own


def test_the_final_width_counts(make, loader):
    results = []
    for options in ({"final_w_sigma": 0.0}, {}, {"final_a_sigma": 0.0}, {"final_a_sigma": 0.0, "final_w_sigma": 0.0}):
        qmodel = low(make, a_sigma=0.5, w_sigma=0.5, slope="unit")
        train(qmodel, loader(), **options)
        results.append([p.detach().clone() for p in qmodel.parameters()])
    for i in range(len(results)):
        assert not all(torch.equal(a, b) for a, b in zip(results[i], results[i - 1], strict=True))


@pytest.mark.parametrize("rounding", ["ste", "ewgs", "dsq"])
def test_other_roundings_are_left_alone(make, loader, rounding):
    qmodel, seen = low(make, rounding=rounding), []
    own = roundings(qmodel)
    train(qmodel, loader(), seen)
    assert all(step == own for step in seen)


def test_a_run_of_unknown_length_and_operands_of_more_bits_keep_their_own(make, loader):
    class Stream:
        def __iter__(self):
            return iter(loader())

    for qmodel, data, bits in ((low(make), Stream(), 2), (low(make), loader(), 1), (low(make, bits=3), loader(), 2)):
        own, seen = roundings(qmodel), []
        train(qmodel, data, seen, schedule="constant", final_sigma_bits=bits)
        assert seen
        assert all(step == own for step in seen)


def test_the_bits_of_the_plan_decide_not_those_of_a_stage(make, loader):
    qmodel, seen = low(make), []
    train(qmodel, loader(), seen, progressive=[[0.5, 4, 4]])
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
