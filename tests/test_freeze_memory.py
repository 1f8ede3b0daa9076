"""`freeze` and `save` take memory for codes and little else beside the model, and share nothing with it afterwards."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import daqconvert as dq
from daqconvert.freezing import dropped_weights
from daqconvert.functional import native
from daqconvert.layers import FrozenSite
from daqconvert.models import quantized_sites
from helpers.converted_networks import NETWORKS, batch, quantized
from helpers.memory import in_tensors, size

ROWS = torch.randn(4, 512)


def calibrated(model, x=ROWS, w_bits=4):
    qmodel = dq.quantize(model, w_bits=w_bits, a_bits=4, first=(w_bits, 4), last=(w_bits, 4))
    dq.calibrate(qmodel, [x], method="minmax")
    return qmodel.eval()


def sites(frozen):
    return [module for module in frozen.modules() if isinstance(module, FrozenSite)]


def chain(*layers):
    return nn.Sequential(*(layers or (nn.Linear(512, 512) for _ in range(20))))


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_freeze_makes_codes_and_little_besides(bits):
    qmodel = calibrated(chain(), w_bits=bits)
    weights = 20 * 512 * 512
    assert size(qmodel.parameters()) > 4 * weights
    for layer in quantized_sites(qmodel).values():
        layer.weight_quantizer._memory = None
    most, left = in_tensors(lambda: dq.freeze(qmodel))
    assert weights < left < 1.03 * weights
    assert most < 1.1 * weights


def test_freeze_takes_over_the_codes_that_quantizers_keep():
    qmodel = calibrated(chain())
    expected = qmodel(ROWS)
    quantizers = [layer.weight_quantizer for layer in quantized_sites(qmodel).values()]
    if native.library() is None:
        pytest.skip("without kernels nothing is kept")
    kept = [quantizer._memory.codes for quantizer in quantizers]
    most, _ = in_tensors(lambda: dq.freeze(qmodel))
    assert most < 0.1 * 20 * 512 * 512  # no code is computed again
    assert all(quantizer._memory is None for quantizer in quantizers)
    qmodel(ROWS)
    frozen = dq.freeze(qmodel)
    assert not {t.data_ptr() for t in kept} & {t.data_ptr() for t in frozen.buffers()}
    for layer in sites(frozen):
        layer.weight_codes.zero_()
    assert torch.equal(qmodel(ROWS), expected) and not torch.equal(frozen(ROWS), expected)


def test_codes_of_other_weights_are_not_taken_over():
    qmodel = calibrated(chain(nn.Linear(512, 8), nn.ReLU(), nn.Linear(8, 4)))
    qmodel(ROWS)
    for layer in quantized_sites(qmodel).values():
        layer.weight.data.mul_(-0.5)
    assert torch.equal(dq.freeze(qmodel)(ROWS), qmodel(ROWS))


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_save_packs_one_tensor_at_a_time(bits, tmp_path):
    frozen = dq.freeze(calibrated(chain(), w_bits=bits))
    most, left = in_tensors(lambda: dq.save(frozen, tmp_path / "artifact"))
    assert most < 0.3 * 20 * 512 * 512
    assert left == 0


@pytest.mark.parametrize("name", NETWORKS)
def test_a_frozen_model_shares_no_memory_with_the_one_it_was_made_from(name):
    qmodel = quantized(name)
    before = {key: value.clone() for key, value in qmodel.state_dict().items()}
    frozen, x = dq.freeze(qmodel), batch(name)
    here = {t.untyped_storage().data_ptr() for t in qmodel.state_dict().values() if t.numel()}
    assert not here & {t.untyped_storage().data_ptr() for t in frozen.state_dict().values() if t.numel()}
    assert all(torch.equal(value, before[key]) for key, value in qmodel.state_dict().items())
    with torch.no_grad():
        expected = frozen(x)
        for parameter in qmodel.parameters():
            parameter.mul_(1.5)
        assert torch.equal(frozen(x), expected)


class Tied(nn.Module):
    """A model whose embedding and linear share a weight; if `noted`, a list refers to the weight too."""

    def __init__(self, noted):
        super().__init__()
        self.embedding, self.inner, self.head = nn.Embedding(8, 6), nn.Linear(6, 6), nn.Linear(6, 8)
        self.head.weight = self.embedding.weight
        self.notes = [self.inner.weight, self.head.weight] if noted else []

    def forward(self, ids):
        return self.head(torch.relu(self.inner(self.embedding(ids).mean(1))))


@pytest.mark.parametrize("noted", [False, True], ids=["tied", "noted"])
def test_what_else_needs_a_weight_gets_its_own(noted):
    qmodel, ids = calibrated(Tied(noted), torch.randint(0, 8, (4, 3))), torch.randint(0, 8, (4, 3))
    frozen = dq.freeze(qmodel)
    expected = frozen(ids)
    assert frozen.embedding.weight is not qmodel.embedding.weight and not frozen.embedding.weight.requires_grad
    assert torch.equal(frozen.embedding.weight, qmodel.embedding.weight)
    assert all(a is not b for a, b in zip(frozen.notes, qmodel.notes, strict=True))
    with torch.no_grad():
        for parameter in qmodel.parameters():
            parameter.mul_(2.0)
    assert torch.equal(frozen(ids), expected)


@pytest.mark.parametrize(
    "way", [prune.random_unstructured, parametrizations.weight_norm, parametrizations.spectral_norm]
)
def test_weights_that_are_computed_are_not_shared(way):
    layer = nn.Linear(512, 512)
    way(layer, "weight", **({"amount": 0.5} if way is prune.random_unstructured else {}))
    qmodel = calibrated(chain(layer, nn.ReLU(), nn.Linear(512, 4)))
    assert [tuple(p.shape) for p in dropped_weights(qmodel)] == [(4, 512)]
    before, expected = copy.deepcopy(qmodel.state_dict()), qmodel(ROWS)
    assert torch.equal(dq.freeze(qmodel)(ROWS), expected)
    assert all(torch.equal(value, before[key]) for key, value in qmodel.state_dict().items())


def test_a_hook_on_a_quantizer_is_asked_when_its_layer_is_frozen():
    qmodel = calibrated(chain(nn.Linear(512, 8), nn.ReLU(), nn.Linear(8, 4)))
    (first, *_) = quantized_sites(qmodel).values()
    first.weight_quantizer.register_forward_hook(lambda module, args, operand: -operand)
    assert torch.equal(dq.freeze(qmodel)(ROWS), qmodel(ROWS))
