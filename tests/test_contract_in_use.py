"""What users and their code rely on in use: gradients, contexts, wrappers, shared layers, frozen weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import daqconvert as dq
from helpers.cases import BY_ID, CASES, GEOMETRIES, NETWORKS, quantized, timm_network

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


LEARNING = ({}, {"w_bits": 2, "a_bits": 2}, {"preset": "paper-w2a2"}, {"rounding": "ste"})


@pytest.mark.parametrize("settings", LEARNING, ids=str)
def test_gradients_are_finite_and_reach_everything_learned(settings):
    model = BY_ID["residual"].make()
    qmodel = dq.quantize(model, **{"first": (4, 4), "last": (4, 4)} | settings)
    x = torch.randn(16, 3, 9, 9)
    dq.calibrate(qmodel, [x], method="percentile")
    qmodel(x).square().mean().backward()
    for name, parameter in qmodel.named_parameters():
        idle = name.endswith("input_quantizer.lower") and not qmodel.get_submodule(name.rpartition(".")[0]).sign
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            assert bool(parameter.grad.any()) is not idle, name


@pytest.mark.parametrize("name", NETWORKS)
def test_a_step_of_training_changes_every_kind_of_parameter(name):
    make, size = NETWORKS[name]
    model, images = make(), torch.randn(4, 3, size, size)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # statistics of this batch, without which the signal would fade
    with torch.no_grad():
        model.train()(images)
    qmodel = dq.quantize(model.eval(), w_bits=4, a_bits=4)
    dq.calibrate(qmodel, [images])
    out = qmodel(images)
    out = out["out"] if isinstance(out, dict) else out
    before = {key: value.clone() for key, value in qmodel.state_dict().items()}
    (out.float() - 1.0).square().mean().backward()
    torch.optim.SGD(qmodel.parameters(), 1e-2).step()
    changed = {key for key, value in qmodel.state_dict().items() if not torch.equal(value, before[key])}
    ends = ("weight", "weight_quantizer.upper", "weight_quantizer.lower", "input_quantizer.upper", "output_scale")
    for end in ends:
        assert any(key.endswith("." + end) for key in changed), end
    assert not any(key.endswith(("calibrated", "signed")) for key in changed)


def test_disabled_nests_and_is_undone_on_exceptions():
    model, qmodel, (x,) = quantized()
    qmodel.eval()
    expected = qmodel(x)
    with pytest.raises(KeyError), dq.disabled(qmodel), dq.disabled(qmodel):
        assert torch.equal(qmodel(x), model(x))
        raise KeyError
    assert torch.equal(qmodel(x), expected)
    with dq.disabled(qmodel):
        with dq.disabled(qmodel):
            pass
        assert torch.equal(qmodel(x), model(x))
    with dq.disabled(model):  # a float model has nothing to disable
        model(x)


def test_disabled_trains_the_float_model():
    model, qmodel, (x,) = quantized()
    with dq.disabled(qmodel):
        qmodel(x).sum().backward()
    model(x).sum().backward()
    assert torch.equal(qmodel.c1.weight.grad, model.c1.weight.grad)
    assert qmodel.c1.weight_quantizer.upper.grad is None


def test_moving_averages_of_a_quantized_model():
    _, qmodel, (x,) = quantized()
    average = torch.optim.swa_utils.AveragedModel(qmodel)
    average.update_parameters(qmodel)
    assert torch.equal(average.module.eval()(x), qmodel.eval()(x))


def test_a_quantized_model_inside_a_wrapper():
    model, qmodel, (x,) = quantized()
    wrapper = nn.Sequential(qmodel, nn.Softmax(-1)).eval()
    with dq.disabled(wrapper):
        assert torch.equal(wrapper(x), model(x).softmax(-1))
    assert torch.equal(dq.freeze(qmodel)(x).softmax(-1), wrapper(x))


@pytest.mark.parametrize("settings", [{}, {"granularity": "tensor"}, {"grid": "midrise", "normalize": True}], ids=str)
@pytest.mark.parametrize("name", ["linear", "grouped-dilated", "transposed2d"])
def test_the_weight_of_a_frozen_layer_is_what_its_codes_stand_for(name, settings):
    cls, args, kwargs, shape = GEOMETRIES[name]
    layer, x = cls(*args, **kwargs), torch.randn(8, *shape)
    qlayer = dq.quantize(layer, **{"first": (4, 4), "last": (4, 4)} | settings)
    dq.calibrate(qlayer, [x])
    frozen = dq.freeze(qlayer)
    assert "weight" not in frozen.state_dict() and frozen.weight.dtype == layer.weight.dtype
    plain = cls(*args, **kwargs)
    plain.load_state_dict({"weight": frozen.weight} | {k: v for k, v in layer.state_dict().items() if k == "bias"})
    on_grid = frozen.input_operand(x) * frozen.input_scale
    assert torch.allclose(plain(on_grid), frozen(x), atol=1e-5)


def test_a_forward_that_asks_a_layer_for_its_dtype_works_once_frozen():
    _, qmodel, (x,) = quantized("caching")
    assert torch.equal(dq.freeze(qmodel)(x), qmodel.eval()(x))
    network = timm_network("xcit_nano_12_p16_224", num_classes=3, img_size=32).eval()
    qmodel = dq.quantize(network)
    images = torch.randn(1, 3, 32, 32)
    dq.calibrate(qmodel, [images])
    assert torch.equal(dq.freeze(qmodel)(images), qmodel(images))


def test_one_module_under_two_names_stays_one():
    _, qmodel, _ = quantized("two-names")
    assert qmodel.z is qmodel.a
    frozen = dq.freeze(qmodel)
    assert frozen.z is frozen.a


def test_a_shared_weight_stays_shared():
    _, qmodel, _ = quantized("tied")
    assert qmodel.a.weight is qmodel.b.weight and qmodel.a.weight_quantizer is not qmodel.b.weight_quantizer
    _, qmodel, _ = quantized("tied-embedding")
    assert qmodel.head.weight is qmodel.embed.weight
    assert dq.freeze(qmodel).embed.weight.shape == (7, 4)


def test_a_layer_called_by_keyword_and_with_an_output_size():
    layer = nn.ConvTranspose2d(4, 2, 3, stride=2)
    x = torch.rand(2, 4, 5, 5)
    qlayer = dq.quantize(layer, first=(2, 8), last=(2, 8), example_inputs={"input": x, "output_size": [12, 11]})
    dq.calibrate(qlayer, [{"input": x, "output_size": [12, 11]}])
    assert qlayer.eval()(input=x, output_size=[12, 11]).shape == (2, 2, 12, 11)
    assert torch.equal(dq.freeze(qlayer)(x, output_size=[12, 11]), qlayer(x, [12, 11]))
    with dq.disabled(qlayer):
        assert torch.equal(qlayer(x, [12, 11]), layer(x, [12, 11]))
