"""Copies stand alone; whole-module files work or name what does; a converted model is not converted again."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

import daqconvert as dq
from daqconvert.errors import ConversionError, FrozenError
from daqconvert.layers.call_holders import CallHolder
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
