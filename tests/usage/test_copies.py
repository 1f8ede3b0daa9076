"""Copies stand alone; whole-module files work or name what does; a converted model is not converted again."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import timm.utils as timm_utils
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import daqconvert as dq
from daqconvert.errors import ConversionError, FrozenError
from daqconvert.layers.call_holders import CallHolder
from daqconvert.quantizers import InputQuantizer
from helpers.converted_networks import NETWORKS, REWRITTEN, batch, quantized

each_network = pytest.mark.parametrize("name", NETWORKS)
each_stage = pytest.mark.parametrize("stage", ["quantized", "frozen"])


def model_of(name, stage):
    return quantized(name) if stage == "quantized" else dq.freeze(quantized(name))


def tensors(model):
    """Storage of every parameter and buffer."""
    return {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers()) if t.numel()}


@each_stage
@each_network
def test_a_copy_computes_the_same_and_shares_nothing(name, stage):
    model, x = model_of(name, stage), batch(name)
    other = copy.deepcopy(model)
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(other(x), expected)
        assert not tensors(other) & tensors(model)
        for tensor in (*other.parameters(), *(b for b in other.buffers() if b.is_floating_point())):
            tensor.mul_(1.5)
        assert torch.equal(model(x), expected) and not torch.equal(other(x), expected)


@each_network
def test_training_a_copy_leaves_the_original(name):
    model, x = quantized(name), batch(name)
    other = copy.deepcopy(model).train()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(other.parameters(), lr=0.01)
    other(x).square().mean().backward()
    optimizer.step()
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    moved = [key for key, p in other.named_parameters() if not torch.equal(p, state[key])]
    assert any("quantizer" in key for key in moved) and any("quantizer" not in key for key in moved)


@pytest.mark.parametrize("name", ["bare", "vision-transformer"])
def test_the_weights_of_a_copys_calls_are_the_copys(name):
    other = copy.deepcopy(quantized(name))
    sites = [module for module in other.modules() if isinstance(module, CallHolder)]
    modules = {id(module) for module in other.modules()}
    for site in sites:
        assert id(site.source[0]) in modules
        assert site.float_weight().untyped_storage().data_ptr() in tensors(other)
    assert sites


@each_stage
@each_network
def test_whole_module_files(name, stage):
    model, x, file = model_of(name, stage), batch(name), io.BytesIO()
    if name in REWRITTEN:
        for write in (torch.save, pickle.dump):
            with pytest.raises(
                ConversionError, match=r"torch\.save\(qmodel\.state_dict\(\), path\).*daqconvert\.save"
            ):
                write(model, file)
        return
    torch.save(model, file)
    file.seek(0)
    for other in (torch.load(file, weights_only=False), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            assert torch.equal(other(x), model(x))
        assert str(dq.plan(other)) == str(dq.plan(model))


@each_network
def test_a_state_dict_is_enough_for_another_process(name):
    model, file = quantized(name), io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = quantized(name)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    other.load_state_dict(torch.load(file, weights_only=True))
    with torch.no_grad():
        assert torch.equal(other(batch(name)), model(batch(name)))


@each_network
def test_converting_again_is_refused(name):
    qmodel = quantized(name)
    frozen = dq.freeze(qmodel)
    with pytest.raises(ConversionError, match=r"quantize: .* is quantized already \(.*Call quantize on the original"):
        dq.quantize(qmodel)
    with pytest.raises(FrozenError, match="quantize: .* is frozen; quantize needs the original float model"):
        dq.quantize(frozen)
    with pytest.raises(FrozenError, match="freeze: .* is frozen"):
        dq.freeze(frozen)
    with pytest.raises(FrozenError, match="calibrate: .* is frozen"):
        dq.calibrate(frozen, [batch(name)])
    with pytest.raises(FrozenError, match=r"cannot be trained\. Call \.eval\(\)"):
        frozen.train()


def small(**bits):
    torch.manual_seed(0)
    return dq.quantize(
        nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), **{"w_bits": 4, "a_bits": 4, **bits}
    )


AVERAGES = {
    "AveragedModel(use_buffers=True)": lambda model: AveragedModel(model, use_buffers=True),
    "AveragedModel": AveragedModel,
    "AveragedModel(ema)": lambda m: AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True),
    "ModelEmaV3": lambda model: timm_utils.ModelEmaV3(model, decay=0.998),
    "ModelEmaV3(foreach=False)": lambda model: timm_utils.ModelEmaV3(model, decay=0.998, foreach=False),
    "ModelEmaV2": lambda model: timm_utils.ModelEmaV2(model, decay=0.998),
}


@pytest.mark.parametrize("rounding", ["daq", "lsq"])
@pytest.mark.parametrize("average", AVERAGES)
def test_an_average_that_began_before_calibrate_has_the_bounds_that_calibrate_set(average, rounding):
    qmodel, x = small(rounding=rounding), torch.randn(64, 8)
    found = AVERAGES[average](qmodel)
    dq.calibrate(qmodel, [x])
    for _ in range(3):
        getattr(found, "update_parameters", getattr(found, "update", None))(qmodel)
    if rounding == "lsq" and average.startswith("ModelEma"):  # its sign was undecided, and no bound tells it
        with pytest.raises(dq.CalibrationError, match=r"^0: .* average of weights that began before calibrate"):
            found.module.eval()(x)
        found.module.load_state_dict(qmodel.state_dict())
        getattr(found, "update")(qmodel)  # noqa: B009
    for ours, theirs in zip(found.module.modules(), qmodel.modules(), strict=True):
        if isinstance(theirs, InputQuantizer):
            assert ours.ready and ours.sign is theirs.sign
            torch.testing.assert_close((ours.lower, ours.upper), (theirs.lower, theirs.upper), rtol=2e-3, atol=1e-4)
    torch.testing.assert_close(found.module.eval()(x), qmodel.eval()(x), rtol=0.1, atol=0.1)
    assert dq.plan(dq.freeze(found.module))["0"].signed is True


@pytest.mark.parametrize("write", ["copy_", "data", "setattr", "assign", "swap"])
def test_flags_follow_their_buffers_however_these_are_written(write):
    qmodel, x = small(), torch.randn(64, 8)
    other = copy.deepcopy(qmodel)
    dq.calibrate(qmodel, [x])
    for ours, theirs in zip(other.modules(), qmodel.modules(), strict=True):
        for name, value in (*theirs._buffers.items(), *theirs._parameters.items()):
            mine, value = getattr(ours, name), value.detach().clone()
            if write == "copy_":
                mine.detach().copy_(value)
            elif write == "data":
                mine.data.copy_(value)
            elif write == "swap":
                mine.data = value
            elif name in ours._buffers and write == "setattr":
                setattr(ours, name, value)
            else:
                mine.data = value
    if write == "assign":
        other.load_state_dict(qmodel.state_dict(), assign=True)
    assert torch.equal(other.eval()(x), qmodel.eval()(x))
    assert torch.equal(torch.compile(copy.deepcopy(other), backend="eager")(x), qmodel(x))
    assert torch.equal(dq.freeze(other)(x), qmodel(x)) and dq.plan(other)["0"].signed is True
    other.load_state_dict(small().state_dict())  # and back
    with pytest.raises(dq.CalibrationError, match="never set"):
        other(x)


def wrapped(model, how):
    return model if how == "itself" else nn.ModuleDict({"module": model})


@pytest.mark.parametrize("how", ["itself", "prefixed"])
@pytest.mark.parametrize("options", [{}, {"strict": False}, {"assign": True}], ids=str)
@pytest.mark.parametrize(
    ("saved", "told"),
    [
        pytest.param({"bits": {"2": (4, 8)}}, r"2: w_bits = 4 \(.*\) there, w_bits = 8 \(.*\) here", id="weight"),
        pytest.param({"bits": {"0": (8, 3)}}, r"0: a_bits = 3 there, a_bits = 8 here", id="input"),
        pytest.param({"grid": "midrise"}, r"0: w_bits = 8 \(midrise, .*\) there, .*\(integer", id="grid"),
        pytest.param({"granularity": "tensor"}, r"per tensor\) there, .* per channel\) here", id="granularity"),
        pytest.param({"normalize": True, "grid": "midrise"}, r"\(normalized midrise, .*\) there", id="normalize"),
    ],
)
def test_a_state_dict_of_another_form_is_refused_before_anything_is_loaded(saved, told, options, how):
    x = torch.randn(64, 8)
    source, model = (small(w_bits=8, a_bits=8, **settings) for settings in (saved, {}))
    for one in (source, model):
        dq.calibrate(one, [x])
    with torch.no_grad():
        source[0].weight.mul_(2.0)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ConversionError, match=rf"^load_state_dict: .*{told}.*quantize\(model, w_bits.*load_float"):
        wrapped(model, how).load_state_dict(wrapped(source, how).state_dict(), **options)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with pytest.raises(ConversionError, match="there"):  # a part of the model alone
        for part, other in zip(model, source, strict=True):
            part.load_state_dict(other.state_dict())
    weights = {
        k: v for k, v in source.state_dict().items() if "_quantizer." not in k and not k.endswith("output_scale")
    }
    dq.load_float(model, weights)  # what the message says to type
    assert torch.equal(model[0].weight, source[0].weight)


def test_bounds_per_channel_of_an_earlier_version_are_not_cut_to_the_first():
    source, model = small(), small(granularity="tensor")
    state = {k: v.bool() if k.endswith("calibrated") else v for k, v in source.state_dict().items()}
    with pytest.raises(
        ConversionError, match=r"0: 16 bounds, one per channel, there, w_bits = 8 \(integer, per tensor"
    ):
        model.load_state_dict(state)


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_of_an_earlier_version_is_loaded_strictly(assign):
    qmodel, x = small(), torch.randn(64, 8)
    dq.calibrate(qmodel, [x])
    state = {k: v.bool() if k.endswith("calibrated") else v.clone() for k, v in qmodel.state_dict().items()}
    other = small()
    other.load_state_dict(state, strict=True, assign=assign)
    assert torch.equal(other.eval()(x), qmodel.eval()(x))
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in qmodel.state_dict().items())


def test_values_copied_from_a_model_of_other_bits_are_not_used():
    source, model, x = small(), small(a_bits=8), torch.randn(64, 8)
    source[2].input_quantizer.set_bits(2)
    for one in (source, model):
        dq.calibrate(one, [x])
    for ours, theirs in zip(model.buffers(), source.buffers(), strict=True):
        ours.copy_(theirs)
    with pytest.raises(dq.CalibrationError, match=r"^2: .* input quantizer .*other bits"):
        model.eval()(x)


def test_a_whole_module_of_an_earlier_version_is_calibrated_and_keeps_its_trained_bounds():
    qmodel, x = small(), torch.randn(16, 8)
    dq.calibrate(qmodel, [x])
    with torch.no_grad():
        qmodel[0].weight_quantizer.upper.mul_(0.9)
    for module in qmodel.modules():
        vars(module).pop("_fitted", None)  # an attribute that it did not have
    other = pickle.loads(pickle.dumps(qmodel))
    before = other[0].weight_quantizer.upper.clone()
    assert dq.calibrate(other, [x]).refitted == () and torch.equal(other[0].weight_quantizer.upper, before)
    with torch.no_grad():
        other[0].weight.mul_(5.0)
    assert dq.calibrate(other, [x]).refitted == ("0",)
