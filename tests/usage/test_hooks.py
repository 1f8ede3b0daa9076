"""Hooks, attributes and methods that the user gave to a model: still there, as often as before."""

from __future__ import annotations

import inspect
from collections import Counter
from types import MethodType

import pytest
import torch
from torch import nn

import daqconvert as dq
from daqconvert.layers import FrozenLayer, QuantizedLayer
from helpers.converted_networks import NETWORKS, batch, float_network

each_network = pytest.mark.parametrize("name", NETWORKS)


def counted(model, calls):
    """Register every kind of hook of a forward and backward on every module; return the model."""
    for name, module in model.named_modules():
        if hasattr(module, "inplace"):
            module.inplace = False  # torch allows no full backward hook before what works in place
        module.register_forward_pre_hook(lambda m, args, name=name: calls.update([("pre", name)]))
        module.register_forward_hook(lambda m, args, out, name=name: calls.update([("forward", name)]))
        if not isinstance(module, nn.BatchNorm2d):  # the residual add behind it works in place, too
            module.register_full_backward_hook(lambda m, gin, gout, name=name: calls.update([("backward", name)]))
    return model


def step(model, x, calls):
    """Run forward and backward; return how often every hook fired."""
    calls.clear()
    model(x.clone().requires_grad_()).square().mean().backward()
    return dict(calls)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@each_network
def test_every_hook_fires_as_often_as_before(name, training):
    calls = Counter()
    model, x = counted(float_network(name), calls).train(training), batch(name)
    before = step(model, x, calls)
    qmodel = dq.quantize(model)
    dq.calibrate(qmodel, [x])
    found = step(qmodel.train(training), x, calls)
    assert len(before) >= 3
    assert {key: found.get(key) for key in before} == before
    more = {path for _, path in found.keys() - before.keys()}  # a layer whose weight was read is called now
    assert all(isinstance(model.get_submodule(path), nn.Linear) for path in more)
    frozen = dq.freeze(qmodel)
    calls.clear()
    with torch.no_grad():
        frozen(x)
    assert {key: calls[key] for key in before if key[0] != "backward"} == {
        key: count for key, count in before.items() if key[0] != "backward"
    }


@each_network
def test_a_hook_that_changes_the_output_still_does(name):
    model, x = float_network(name), batch(name)
    for module in model.modules():
        if not list(module.children()):
            module.register_forward_pre_hook(lambda m, args: tuple(a * 0.5 for a in args))
            module.register_forward_hook(lambda m, args, out: out + 0.25)
    model.register_forward_hook(lambda m, args, out: out * 2.0)
    qmodel = dq.quantize(model)
    dq.calibrate(qmodel, [x])
    with torch.no_grad(), dq.disabled(qmodel):
        assert torch.equal(qmodel(x), model(x))
    with torch.no_grad():
        assert torch.equal(dq.freeze(qmodel)(x), qmodel.eval()(x))


@each_network
def test_hooks_of_the_state_dict(name):
    model, seen = float_network(name), []
    for path, module in model.named_modules():
        module.register_state_dict_post_hook(lambda m, sd, prefix, meta, path=path: seen.append(("post", path)))
        module.register_state_dict_pre_hook(lambda m, prefix, keep, path=path: seen.append(("pre", path)))
        module.register_load_state_dict_pre_hook(lambda m, *args, path=path: seen.append(("load", path)))
    qmodel = dq.quantize(model)
    seen.clear()
    model.load_state_dict(model.state_dict())
    before = Counter(seen)
    seen.clear()
    qmodel.load_state_dict(qmodel.state_dict())
    assert Counter(seen) == before and len(before) >= 3


@each_network
def test_attributes_methods_and_signatures(name):
    model = float_network(name)
    for path, module in model.named_modules():
        module.note = path
        module.say = MethodType(lambda self: (type(self).__mro__, self.note), module)
    qmodel = dq.quantize(model)
    dq.calibrate(qmodel, [batch(name)])
    for stage in (qmodel, dq.freeze(qmodel)):
        modules = dict(stage.named_modules())
        for path, module in model.named_modules():
            twin = modules[path]
            assert twin.note == path and isinstance(twin, type(module))
            classes, note = twin.say()  # bound to the copy, not to the model it was copied from
            assert note == path and type(module) in classes and classes == type(twin).__mro__
            if not isinstance(twin, (QuantizedLayer, FrozenLayer)):  # a layer takes what its class takes
                assert inspect.signature(twin.forward) == inspect.signature(module.forward), path
