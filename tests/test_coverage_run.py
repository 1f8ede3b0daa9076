"""`coverage` leaves a model and its surroundings as they were, and counts a compiled model as it was written."""

import copy
import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module

import daqconvert as dq
from helpers import awkward_models as awkward

X = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))


def calibrated(model):
    qmodel = dq.quantize(model, w_bits=4, a_bits=4)
    dq.calibrate(qmodel, [X])
    return qmodel


class Leaky(nn.Module):
    """Keeps everything it can: statistics, attributes, counts, random numbers."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.register_buffer("seen", torch.zeros(()))
        self.calls = 0

    def forward(self, x):
        self.calls, self.last, self.seen = self.calls + 1, x, self.seen + x.sum()
        return F.dropout(self.bn(self.conv(x))) * random.random()


@pytest.mark.parametrize("fails", [False, True], ids=["runs", "fails"])
def test_nothing_is_left_behind(fails):
    qmodel = calibrated(Leaky()).train()
    frozen = dq.freeze(qmodel)
    frozen.fails = qmodel.fails = fails
    if fails:
        for model in (qmodel, frozen):
            model.register_forward_hook(lambda *_: 1 / 0)
    for model in (qmodel, frozen):
        before = copy.deepcopy(model.state_dict())
        attributes = [dict(vars(m)) for m in model.modules()]
        buffers = [dict(m._buffers) for m in model.modules()]
        versions = [b._version for b in model.conv.buffers()]
        generators = torch.get_rng_state(), random.getstate()
        hooks = [dict(h) for h in (torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks)]
        try:
            dq.coverage(model, X)
        except ZeroDivisionError:
            assert fails
        else:
            assert not fails
        assert versions == [b._version for b in model.conv.buffers()]
        for module, own, held in zip(model.modules(), attributes, buffers, strict=True):
            assert vars(module).keys() == own.keys() and all(vars(module)[key] is own[key] for key in own)
            assert all(module._buffers[key] is held[key] for key in held)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert torch.equal(torch.get_rng_state(), generators[0]) and random.getstate() == generators[1]
        assert hooks == [torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks]
        assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack()


@pytest.mark.parametrize("wrap", ["whole", "part", "in place"])
def test_a_compiled_model_is_counted_as_it_was_written(wrap):
    qmodel = calibrated(awkward.Chain())
    expected = dq.coverage(qmodel, X)
    if wrap == "whole":
        model = torch.compile(qmodel, backend="aot_eager")
    else:
        model = qmodel
        if wrap == "part":
            qmodel[3] = torch.compile(qmodel[3], backend="aot_eager")
        else:
            qmodel.compile(backend="aot_eager")
    with torch.no_grad():
        model(X)  # compiled by now
        assert dq.coverage(model, X) == expected
