"""Weights that a layer computes from other parameters."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import daqconvert as dq
from helpers.cases import BY_ID


def test_old_weight_norm_goes_on_computing_its_weight():
    model = BY_ID["old-weight-norm"].make()
    qmodel = dq.quantize(model)
    with torch.no_grad():
        qmodel[0].weight_g.mul_(2.0)
    x = torch.randn(3, 4)
    with dq.disabled(qmodel):
        bias = model[0].bias
        torch.testing.assert_close(qmodel[0](x) - bias, 2 * (model[0](x) - bias))


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight

    def right_inverse(self, weight):
        return weight / 2


def parametrized(layer, how):
    if how in ("double", "both"):
        parametrize.register_parametrization(layer, "weight", Doubled())
    if how == "both":
        parametrize.register_parametrization(layer, "bias", Doubled())
    makers = {"weight_norm": parametrizations.weight_norm, "spectral_norm": parametrizations.spectral_norm}
    makers |= {"orthogonal": parametrizations.orthogonal, "old weight_norm": nn.utils.weight_norm}
    makers |= {"old spectral_norm": nn.utils.spectral_norm}
    makers |= {"prune": lambda one: prune.l1_unstructured(one, "weight", 0.3)}
    if how in makers:
        makers[how](layer)


def plain_again(layer, how, leave):
    if how == "old weight_norm":
        nn.utils.remove_weight_norm(layer)
    elif how == "old spectral_norm":
        nn.utils.remove_spectral_norm(layer)
    elif how == "prune":
        prune.remove(layer, "weight")
    else:
        for name in list(layer.parametrizations):
            parametrize.remove_parametrizations(layer, name, leave)


def three_layers(how=None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    parametrized(model[2], how)
    return model


@pytest.mark.filterwarnings("ignore:.*(weight_norm|spectral_norm):FutureWarning")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    ("how", "leave"),
    [
        *(("double", leave) for leave in (True, False)),
        *(("both", leave) for leave in (True, False)),
        *(("spectral_norm", leave) for leave in (True, False)),
        *((how, True) for how in ("weight_norm", "orthogonal", "old weight_norm", "old spectral_norm", "prune")),
    ],
)
def test_what_computes_a_weight_is_removed_from_a_quantized_layer(how, leave, when, tmp_path):
    model, x = three_layers(how if when == "before" else None), torch.randn(64, 8)
    with torch.no_grad():
        before = model(x)
        qmodel = dq.quantize(model, w_bits=4, a_bits=4)
        if when == "after":
            parametrized(qmodel[2], how)
            qmodel.eval()
        dq.calibrate(qmodel, [x])
        y = qmodel.eval()(x)
        assert torch.equal(dq.freeze(qmodel)(x), y) and torch.equal(copy.deepcopy(qmodel)(x), y)
        with torch.enable_grad():  # without, torch makes the weight of `weight_norm` a buffer
            plain_again(qmodel[2], how, leave)
        assert type(qmodel[2]).__name__ == "QuantLinear" and type(qmodel[2].weight) is nn.Parameter
        if leave:
            torch.testing.assert_close(qmodel(x), y, rtol=1e-4, atol=1e-4)
        assert torch.equal(model(x), before)  # the float model has its own
        frozen = dq.freeze(qmodel)
        assert torch.equal(frozen(x), qmodel(x))
        path = dq.save(frozen, tmp_path / "artifact")
        for skeleton in (three_layers(), model):
            assert torch.equal(dq.load(path, model=skeleton)(x), frozen(x))
        again = dq.quantize(model, w_bits=4, a_bits=4)  # classes that torch has changed are not used again
        dq.calibrate(again, [x])
        parametrized(qmodel[2], how)
        dq.calibrate(qmodel, [x])
        assert torch.equal(dq.freeze(qmodel)(x), qmodel.eval()(x))
