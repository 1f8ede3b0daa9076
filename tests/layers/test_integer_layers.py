"""Models frozen for integer deployment: what their layers hold, how exact they are, what they refuse."""

import copy
import pickle

import pytest
import torch
from torch import nn

import daqconvert as dq
from daqconvert.functional.integer import int32_reference
from daqconvert.layers.integer_layers import FoldedBatchNorm, fold, folded_numbers
from daqconvert.layers.output_quantizers import FrozenOutputQuantizer
from helpers.cases import CASES, run
from helpers.integer_networks import NETWORKS, quantized, trained

WIDTHS = [(1, 2), (2, 2), (3, 5), (4, 4), (8, 8)]


@pytest.mark.parametrize(("w_bits", "a_bits"), WIDTHS)
@pytest.mark.parametrize("name", NETWORKS)
def test_float_arithmetic_is_the_int32_reference(name, w_bits, a_bits):
    qmodel, x = quantized(name, w_bits, a_bits)
    frozen = dq.freeze(qmodel)
    y = frozen(x)
    with int32_reference():
        assert torch.equal(frozen(x), y)
    assert torch.equal(copy.deepcopy(frozen)(x), y)
    if x.dim() == 4:
        assert torch.equal(frozen(x.contiguous(memory_format=torch.channels_last)), y)
    assert torch.isfinite(y).all() and y.std() > 0


@pytest.mark.parametrize("name", NETWORKS)
def test_it_is_near_what_was_trained(name):
    """At 8 bits, rounding biases to 1/127 of a unit and folding batch norms changes a code here and there."""
    qmodel, x = quantized(name, 8, 8)
    trained_y, y = qmodel(x), dq.freeze(qmodel)(x)
    assert (trained_y - y).abs().max() <= 0.06 * trained_y.abs().max()


def test_sums_beyond_float32_are_exact():
    model = nn.Sequential(nn.Conv2d(300, 4, 3, bias=False), nn.ReLU(), nn.Conv2d(4, 2, 1))
    with torch.no_grad():
        model[0].weight.fill_(0.5).add_(torch.rand_like(model[0].weight) * 0.01)
    x = torch.rand(2, 300, 5, 5) + 1.0
    qmodel = dq.quantize(model, w_bits=8, a_bits=8, deploy="integer")
    dq.calibrate(qmodel, [x])
    frozen = dq.freeze(qmodel)
    y = frozen(x)
    with int32_reference():
        assert torch.equal(frozen(x), y)


def test_what_a_frozen_model_holds():
    qmodel, _ = quantized("residual")
    frozen = dq.freeze(qmodel)
    assert type(frozen) is type(qmodel)
    layer, norm = frozen.block.conv1, frozen.block.bn1
    assert set(layer.state_dict()) == {
        "weight_codes", "input_scale", "input_zero_point", "w_scale", "w_factor", "bias_codes", "y_scale",
        "y_zero_point", "y_range",
    }  # fmt: skip
    assert layer.w_factor[0] < 0 and layer.w_factor[1] == 0 and layer.w_factor[2] > 0  # signs of gamma
    assert isinstance(norm, FoldedBatchNorm) and isinstance(norm, nn.BatchNorm2d) and not norm.state_dict()
    assert torch.equal(layer.y_scale, frozen.block.conv2.input_scale)
    assert isinstance(frozen.pool.output_quantizer, FrozenOutputQuantizer)
    assert not frozen.fc.is_integer and "scale" in frozen.fc.state_dict()
    assert not any(p.requires_grad for p in frozen.parameters())


def test_every_convolution_lies_on_a_grid():
    frozen = dq.freeze(quantized("inverted")[0])
    assert all(m.is_integer for m in frozen.modules() if isinstance(m, nn.Conv2d))


def test_dead_channel_is_constant():
    qmodel, x = quantized("inverted", 8, 8)
    frozen, seen = dq.freeze(qmodel), []
    handle = frozen[1].expand[0].register_forward_hook(lambda m, args, y: seen.append(y[:, 1]))
    frozen(x)
    handle.remove()
    assert seen[0].unique().numel() == 1


def test_folded_numbers_are_the_batch_norm():
    norm = nn.BatchNorm2d(5).double()
    x = torch.randn(8, 5, 3, 3, dtype=torch.float64) * 3 + 1
    norm.train()(x)
    norm.eval()
    g, b = folded_numbers(norm)
    assert torch.allclose(x * g.reshape(-1, 1, 1) + b.reshape(-1, 1, 1), norm(x), rtol=1e-12, atol=1e-12)
    fold(norm)
    assert torch.equal(norm(x), x) and "folded" in repr(norm)
    assert torch.equal(pickle.loads(pickle.dumps(norm))(x), x)


@pytest.mark.parametrize("name", ["residual", "joined", "head"])
def test_saved_and_loaded(name, tmp_path):
    qmodel, x = quantized(name)
    frozen = dq.freeze(qmodel)
    dq.save(frozen, tmp_path / "artifact")
    loaded = dq.load(tmp_path / "artifact", model=trained(name)[0])
    assert torch.equal(loaded(x), frozen(x))
    assert {k: v.dtype for k, v in loaded.state_dict().items()} == {k: v.dtype for k, v in frozen.state_dict().items()}


def test_quantized_state_is_loaded_strictly():
    qmodel, x = quantized("residual")
    other, _ = quantized("residual")
    other.load_state_dict(qmodel.state_dict())
    assert torch.equal(other(x), qmodel(x))
    keys = set(qmodel.state_dict()) - set(trained("residual")[0].state_dict())
    assert {"pool.output_quantizer.input_quantizer.upper", "block.output_quantizer.input_quantizer.upper"} <= keys
    assert not any(key.endswith("output_quantizer.output_scale") for key in keys)


def test_float_state_is_loaded_and_waits_for_calibration():
    qmodel, x = quantized("residual")
    dq.load_float(qmodel, trained("residual")[0].state_dict())
    with pytest.raises(dq.errors.CalibrationError, match="pool.output_quantizer"):
        dq.freeze(qmodel)
    dq.calibrate(qmodel, [x])
    dq.freeze(qmodel)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_every_awkward_model_freezes(case):
    batch = case.batch()
    qmodel = dq.quantize(case.make().eval(), w_bits=4, a_bits=8, deploy="integer")
    dq.calibrate(qmodel, [batch])
    frozen = dq.freeze(qmodel)
    with int32_reference(), torch.no_grad():
        wanted = run(frozen, batch)
    found = run(frozen, batch)
    for a, b in zip(*(torch.utils._pytree.tree_leaves(value) for value in (found, wanted)), strict=True):
        assert torch.equal(a, b)
