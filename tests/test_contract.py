"""What users and their code rely on: names of keys, loading, classes, hooks, copies, dtypes, gradients."""

from __future__ import annotations

import copy
import io
import re

import pytest
import torch
from torch import nn

import daqconvert as dq
from cases import BY_ID, CASES, GEOMETRIES, NETWORKS, run, timm_network
from daqconvert.errors import ConversionError
from daqconvert.modes import quantized_layers

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)

WEIGHT_KEYS = {f"weight_quantizer.{key}" for key in ("lower", "upper", "calibrated")}
INPUT_KEYS = {f"input_quantizer.{key}" for key in ("lower", "upper", "calibrated", "signed")}


def data(batch):
    return [batch if isinstance(batch, dict) else batch[0]]


def quantized(case_id="residual", **settings):
    case = BY_ID[case_id]
    model = case.make().eval()
    qmodel = dq.quantize(model, **settings)
    dq.calibrate(qmodel, data(case.batch()))
    return model, qmodel, case.batch()


@each_case
def test_the_model_given_is_untouched(case):
    model = case.make()
    state, types = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    identities = [id(t) for t in (*model.parameters(), *model.buffers())]
    qmodel = dq.quantize(model, w_bits=2, a_bits=2, example_inputs=case.batch())
    dq.calibrate(qmodel, data(case.batch()))

    assert [type(m) for m in model.modules()] == types
    assert [id(t) for t in (*model.parameters(), *model.buffers())] == identities
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in state.items())
    shared = {t.data_ptr() for t in model.parameters()} & {t.data_ptr() for t in qmodel.parameters()}
    assert not shared


@each_case
def test_class_and_keys(case):
    model = case.make()
    qmodel = dq.quantize(model)
    assert isinstance(qmodel, type(model))
    if "" not in case.converted:
        assert type(qmodel) is type(model)

    prefixes = [f"{name}." if name else "" for name in case.converted]
    extra = {prefix + key for prefix in prefixes for key in (*WEIGHT_KEYS, *INPUT_KEYS, "output_scale")}
    aliased = {"z." + key for key in (*WEIGHT_KEYS, *INPUT_KEYS, "output_scale")} if case.id == "two-names" else set()
    assert set(qmodel.state_dict()) - set(model.state_dict()) == extra | aliased

    result = qmodel.load_state_dict(model.state_dict(), strict=False)
    assert set(result.missing_keys) == extra | aliased and result.unexpected_keys == []
    with pytest.raises(RuntimeError, match="Missing key"):
        qmodel.load_state_dict(model.state_dict())


def test_a_side_left_float_has_no_keys():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    qmodel = dq.quantize(model, first=(4, None), last=(None, 4))
    keys = set(qmodel.state_dict()) - set(model.state_dict())
    assert {k for k in keys if k.startswith("0.")} == {"0." + key for key in (*WEIGHT_KEYS, "output_scale")}
    assert {k for k in keys if k.startswith("2.")} == {"2." + key for key in (*INPUT_KEYS, "output_scale")}
    assert qmodel[0].input_quantizer is None and qmodel[2].weight_quantizer is None
    dq.calibrate(qmodel, [torch.randn(5, 4)])
    assert torch.equal(dq.freeze(qmodel)(torch.ones(1, 4)), qmodel.eval()(torch.ones(1, 4)))


@each_case
def test_strict_loading_of_a_quantized_state_dict(case):
    model = case.make().eval()
    qmodel = dq.quantize(model, w_bits=3, a_bits=4)
    dq.calibrate(qmodel, data(case.batch()))
    other = dq.quantize(case.make(), w_bits=3, a_bits=4)

    other.load_state_dict(copy.deepcopy(qmodel.state_dict()))

    assert torch.equal(run(other.eval(), case.batch()), run(qmodel.eval(), case.batch()))
    for name, layer in quantized_layers(other).items():
        theirs = qmodel.get_submodule(name)
        assert layer.input_quantizer.sign is theirs.input_quantizer.sign is not None
        assert layer.input_quantizer.lower.requires_grad is theirs.input_quantizer.sign
        assert layer.input_quantizer.ready and layer.weight_quantizer.ready
    assert [row.signed for row in dq.plan(other)] == [row.signed for row in dq.plan(qmodel)]
    assert torch.equal(run(dq.freeze(other), case.batch()), run(qmodel, case.batch()))


def test_strict_loading_stays_strict():
    _, qmodel, _ = quantized()
    state = qmodel.state_dict()
    state.pop("c1.output_scale")
    with pytest.raises(RuntimeError, match=r"c1\.output_scale"):
        qmodel.load_state_dict(state)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        qmodel.load_state_dict(state | {"c1.output_scale": torch.ones(4), "c1.zero": torch.ones(1)})


def test_loading_an_uncalibrated_state_dict_says_so():
    model, qmodel, batch = quantized()
    qmodel.load_state_dict(dq.quantize(model).state_dict())
    with pytest.raises(dq.DaqError, match=r"daqconvert\.calibrate"):
        run(qmodel, batch)


@each_case
def test_load_float(case):
    model, donor = case.make().eval(), case.make().eval()
    qmodel = dq.quantize(model, w_bits=4, a_bits=4)
    dq.calibrate(qmodel, data(case.batch()))

    assert dq.load_float(qmodel, donor.state_dict()) is qmodel

    for layer in quantized_layers(qmodel).values():
        assert not layer.input_quantizer.calibrated and not layer.weight_quantizer.calibrated
    with pytest.raises(dq.DaqError, match="never set"):
        run(qmodel, case.batch())
    with dq.disabled(qmodel):
        assert torch.equal(run(qmodel.eval(), case.batch()), run(donor, case.batch()))
    fresh = dq.quantize(donor, w_bits=4, a_bits=4)
    dq.calibrate(fresh, data(case.batch()))
    dq.calibrate(qmodel, data(case.batch()))
    assert torch.equal(run(qmodel, case.batch()), run(fresh.eval(), case.batch()))
    assert [row.signed for row in dq.plan(qmodel)] == [row.signed for row in dq.plan(fresh)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda sd: sd.pop("c1.weight"), "missing c1.weight"),
        (lambda sd: sd.update({"c9.weight": torch.ones(1)}), "unexpected c9.weight"),
        (lambda sd: sd.update({"c1.weight": torch.ones(4, 4, 1, 1)}), r"c1.weight: expected shape (4, 4, 3, 3)"),
        (lambda sd: sd.update({"c1.output_scale": torch.ones(4)}), "unexpected c1.output_scale"),
    ],
    ids=["missing", "unexpected", "shape", "quantized"],
)
def test_load_float_is_strict_and_changes_nothing_on_refusal(change, message):
    model, qmodel, batch = quantized()
    state = {key: value + 1.0 if value.is_floating_point() else value for key, value in model.state_dict().items()}
    change(state)
    before = copy.deepcopy(qmodel.state_dict())
    with pytest.raises(ConversionError, match=re.escape(message)):
        dq.load_float(qmodel, state)
    assert all(torch.equal(value, before[key]) for key, value in qmodel.state_dict().items())
    run(qmodel, batch)


def test_methods_and_attributes_stay():
    model = timm_network("resnet18", num_classes=7).eval()
    qmodel = dq.quantize(model)
    x = torch.randn(1, 3, 32, 32)
    dq.calibrate(qmodel, [x])
    assert type(qmodel) is type(model) and qmodel.num_classes == 7
    assert qmodel.get_classifier() is qmodel.fc and qmodel.fc.in_features == 512
    assert torch.equal(qmodel.forward_head(qmodel.forward_features(x)), qmodel(x))
    assert qmodel.conv1.stride == (2, 2) and qmodel.conv1.padding == (3, 3)
    assert "w_bits=8" in repr(qmodel.conv1) and "bias=False" in repr(qmodel.conv1)


def test_hooks_attributes_and_frozen_parameters_of_the_user_stay():
    model, calls = BY_ID["chain"].make().eval(), []
    model[3].register_forward_hook(lambda module, args, out: calls.append(("forward", out.shape)))
    model[3].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    model[3].register_full_backward_hook(lambda module, grad_in, grad_out: calls.append(("backward", None)))
    model[3].note, model[0].weight.requires_grad = "mine", False
    qmodel = dq.quantize(model)
    x = BY_ID["chain"].batch()[0]
    dq.calibrate(qmodel, [x])
    calls.clear()

    qmodel(x).sum().backward()

    assert [kind for kind, _ in calls] == ["forward", "backward"]
    assert qmodel[3].note == "mine" and not qmodel[0].weight.requires_grad and qmodel[3].weight.requires_grad
    with dq.disabled(qmodel):
        assert torch.equal(qmodel(x), model(x))  # the hook that doubles is still there
    calls.clear()
    frozen = dq.freeze(qmodel)
    assert torch.equal(frozen(x), qmodel(x)) and [kind for kind, _ in calls] == ["forward", "forward"]


@pytest.mark.parametrize("stage", ["quantized", "frozen"])
@pytest.mark.parametrize("case_id", ["residual", "root-conv", "upsampling", "tied", "encoder", "keywords"])
def test_copies_and_whole_module_files(case_id, stage):
    _, model, batch = quantized(case_id, w_bits=3, a_bits=4)
    model = dq.freeze(model) if stage == "frozen" else model.eval()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(run(other, batch), run(model, batch))
        assert str(dq.plan(other)) == str(dq.plan(model))
        assert all(p.data_ptr() != o.data_ptr() for p, o in zip(other.parameters(), model.parameters(), strict=True))


def test_a_timm_model_can_be_saved_whole():
    qmodel = dq.quantize(NETWORKS["lite0"][0]())
    file = io.BytesIO()
    torch.save(qmodel, file)
    file.seek(0)
    assert torch.load(file, weights_only=False).state_dict().keys() == qmodel.state_dict().keys()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtype_stays(dtype):
    model = BY_ID["residual"].make().to(dtype)
    x = torch.randn(2, 3, 9, 9, dtype=dtype)
    qmodel = dq.quantize(model)
    dq.calibrate(qmodel, [x])
    assert {p.dtype for p in qmodel.parameters()} == {dtype}
    out = qmodel(x)
    assert out.dtype == dtype
    out.float().square().mean().backward()
    assert all(p.grad.dtype == dtype for p in qmodel.parameters() if p.grad is not None)
    assert dq.freeze(qmodel)(x).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_frozen_model_can_be_cast(dtype):
    _, qmodel, (x,) = quantized()
    frozen = dq.freeze(qmodel)
    scale, zero_point = frozen.c1.scale.clone(), frozen.c1.input_scale.clone()
    half = copy.deepcopy(frozen).to(dtype)
    assert half(x.to(dtype)).dtype == dtype
    assert torch.allclose(half(x.to(dtype)).float(), frozen(x), atol=0.1)
    assert torch.equal(half.c1.scale, scale) and torch.equal(half.c1.input_scale, zero_point)
    assert torch.equal(half.to(torch.float64).c1.scale, scale.double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_gives_the_dtype_that_the_original_gives(dtype):
    model, qmodel, (x,) = quantized("chain")
    qmodel.eval()
    frozen = dq.freeze(qmodel)
    with torch.no_grad(), torch.autocast("cpu", dtype):
        assert qmodel(x).dtype == model(x).dtype == dtype
        assert torch.equal(frozen(x), qmodel(x))
        rough = frozen(x).float()
    assert torch.allclose(rough, frozen(x), rtol=0.05, atol=0.05)


def test_device_stays_meta():
    with torch.device("meta"):
        model = BY_ID["residual"].make()
    qmodel = dq.quantize(model)
    assert all(t.is_meta for t in (*qmodel.parameters(), *qmodel.buffers()))
    donor = BY_ID["residual"].make()
    reference = dq.quantize(donor)
    qmodel.load_state_dict(reference.state_dict(), assign=True)
    x = BY_ID["residual"].batch()[0]
    dq.calibrate(qmodel, [x])
    dq.calibrate(reference, [x])
    assert torch.equal(qmodel.eval()(x), reference.eval()(x))


LEARNING = ({}, {"w_bits": 2, "a_bits": 2}, {"preset": "paper-w2a2"}, {"rounding": "ste"})


@pytest.mark.parametrize("settings", LEARNING, ids=str)
def test_gradients_are_finite_and_reach_everything_learned(settings):
    model = BY_ID["residual"].make()
    qmodel = dq.quantize(model, **{"first": (4, 4), "last": (4, 4)} | settings)
    x = torch.randn(16, 3, 9, 9)
    dq.calibrate(qmodel, [x], method="percentile")
    qmodel(x).square().mean().backward()
    for name, parameter in qmodel.named_parameters():
        learned = parameter.requires_grad
        if name.endswith("input_quantizer.lower"):
            assert learned is bool(qmodel.get_submodule(name.rpartition(".")[0]).sign)
        if learned:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name


@pytest.mark.parametrize("name", NETWORKS)
def test_a_step_of_training_changes_every_kind_of_parameter(name):
    make, size = NETWORKS[name]
    model, images = make(), torch.randn(4, 3, size, size)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # statistics of this batch: without them the signal is lost on the way
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
