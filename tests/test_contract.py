"""What users and their code rely on: names of keys, loading, classes, hooks, copies, dtypes, gradients."""

from __future__ import annotations

import copy
import io
import re

import pytest
import torch
from torch import nn

import daqconvert as dq
from daqconvert.errors import ConversionError
from daqconvert.models import quantized_sites
from helpers.cases import BY_ID, CASES, NETWORKS, data, quantized, run, timm_network

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)

WEIGHT_KEYS = {f"weight_quantizer.{key}" for key in ("lower", "upper", "calibrated")}
INPUT_KEYS = {f"input_quantizer.{key}" for key in ("lower", "upper", "calibrated", "signed")}


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
    if "" not in case.converted and case.id not in ("functional", "bare-parameters"):  # else the root is rewritten
        assert type(qmodel) is type(model)

    prefixes = [f"{name}." if name else "" for name in case.modules]
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
    for name, layer in quantized_sites(other).items():
        theirs = qmodel.get_submodule(name)
        assert layer.input_quantizer.sign is theirs.input_quantizer.sign is not None
        assert layer.input_quantizer.lower.requires_grad and theirs.input_quantizer.lower.requires_grad
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

    for layer in quantized_sites(qmodel).values():
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
        assert torch.equal(qmodel(x), model(x))  # the hook, which doubles the output, is still there
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
