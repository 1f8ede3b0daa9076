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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("channels", [3, 1200], ids=["in float32", "in parts"])
def test_not_a_number_stays_one(channels, dtype):
    """A sample with NaN in it gives NaN, as in the float form; infinity is clipped; other samples are unchanged."""
    model = nn.Sequential(
        nn.Conv2d(channels, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(16, 3)
    )
    x = torch.randn(4, channels, 4, 4, dtype=dtype)
    qmodel = dq.quantize(model.eval().to(dtype), w_bits=8, a_bits=8, deploy="integer")
    dq.calibrate(qmodel, [x])
    frozen = dq.freeze(qmodel)
    wanted, x = frozen(x), x.clone()
    x[1, 0, 1, 1], x[2, 0, 1, 1], x[3, 0, 1, 1] = torch.nan, torch.inf, -torch.inf
    y, finite = frozen(x), x.nan_to_num(posinf=1e30, neginf=-1e30)
    assert y[1].isnan().all() and torch.equal(y[0], wanted[0]) and y[2:].isfinite().all()
    assert torch.equal(y[2:], frozen(finite)[2:])
    assert torch.equal(y.isnan(), qmodel.eval()(x).isnan())


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


class SumOfTwo(nn.Module):
    """A quantized sum, read by a convolution and by a linear layer that returns float; no parameter stays in float."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(3, 4, 1, bias=False), nn.Conv1d(4, 4, 1, bias=False)
        self.act, self.join = nn.ReLU(), nn.ReLU()
        self.c, self.d = nn.Conv1d(4, 6, 1, bias=False), nn.Linear(6, 6, bias=False)

    def forward(self, x):
        y = self.act(self.a(x))
        y = self.join(y + self.b(y))
        return self.c(y) + self.d(y).sum()


def test_readers_follow_the_scale_of_a_sum():
    qmodel = dq.quantize(SumOfTwo().eval(), w_bits=8, a_bits=8, deploy="integer")
    dq.calibrate(qmodel, [torch.randn(4, 3, 6)])
    of_sum = qmodel.join.output_quantizer
    for k in range(30):  # until the scale of the sum has to move
        with torch.no_grad():
            for site in (of_sum, qmodel.c, qmodel.d):
                site.input_quantizer.upper.fill_(1.0 + k * 0.01)
        frozen = dq.freeze(qmodel)
        scale, before = frozen.join.output_quantizer.input_scale, of_sum.input_quantizer.scale()
        if scale != before:
            break
    assert before < scale < before * (1 + 1e-4) and torch.equal(qmodel.c.input_quantizer.scale(), before)
    assert torch.equal(frozen.c.input_scale, scale) and torch.equal(frozen.d.input_scale, scale)
    # weights are worth what they were, to the last bit but one; only the unit of the input has changed
    assert torch.equal(frozen.d.scale, (qmodel.d.sum_scale().double() * (scale.double() / before.double())).float())
    wanted = qmodel.c.sum_scale().double() / before.double()
    torch.testing.assert_close(frozen.c.w_scale.double(), wanted, rtol=2.0**-23, atol=0)


@pytest.mark.parametrize("deploy", ["integer", "float"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "make", [SumOfTwo, lambda: nn.Sequential(nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4), nn.Linear(6, 6))]
)
def test_every_verb_takes_every_dtype(make, dtype, deploy, tmp_path):
    model, x = make().eval().to(dtype), torch.randn(4, 3, 6, dtype=dtype)
    qmodel = dq.quantize(model, w_bits=8, a_bits=8, deploy=deploy)
    dq.calibrate(qmodel, [x])
    frozen = dq.freeze(qmodel)
    dq.save(frozen, tmp_path / "artifact")
    loaded = dq.load(tmp_path / "artifact", model=make().eval().to(dtype))
    assert loaded(x).dtype == dtype and torch.equal(loaded(x), frozen(x))
    assert {k: v.dtype for k, v in loaded.state_dict().items()} == {k: v.dtype for k, v in frozen.state_dict().items()}
    report = dq.export(frozen, tmp_path / "model.onnx", x)
    assert report.agrees and all(layer.differing == 0 for layer in report.layers)
    assert dq.export(frozen, tmp_path / "model.pt2", x).agrees
    assert dq.verify(qmodel, frozen, [x]).sqnr > 25


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_cast_after_freezing(dtype, tmp_path):
    qmodel, x = quantized("residual")
    frozen = dq.freeze(qmodel)
    sums = {name: value for name, value in frozen.state_dict().items() if name.endswith(("w_scale", "y_scale"))}
    frozen = frozen.to(dtype)
    assert all(torch.equal(frozen.state_dict()[name], value) for name, value in sums.items())
    dq.save(frozen, tmp_path / "artifact")
    loaded = dq.load(tmp_path / "artifact", model=trained("residual")[0].to(dtype))
    assert torch.equal(loaded(x.to(dtype)), frozen(x.to(dtype)))


READS = {
    "weight": lambda model: model.bn.weight.sum(),
    "bias": lambda model: model.bn.bias.mean(),
    "mean": lambda model: model.bn.running_mean.abs().sum(),
    "variance": lambda model: model.bn.running_var.sqrt().mean(),
    "batches": lambda model: model.bn.num_batches_tracked.float(),
    "eps": lambda model: model.bn.eps,
    "dtype": lambda model: torch.ones((), dtype=model.bn.weight.dtype, device=model.bn.bias.device),
    "whether there is a weight": lambda model: 0.25 if model.bn.weight is None else 0.75,
    "all parameters": lambda model: sum(parameter.sum() for parameter in model.bn.parameters()),
    "bias of the convolution": lambda model: model.conv.bias.sum(),
    "whether the convolution has a bias": lambda model: 0.25 if model.conv.bias is None else 0.75,
    "bias of a linear": lambda model: model.one.bias.sum(),
}


class Reads(nn.Module):
    """A forward that reads the numbers of a layer that freezing folds, or a bias that it replaces by codes."""

    def __init__(self, read) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4), nn.ReLU()
        self.next, self.one, self.two = nn.Conv1d(4, 4, 1), nn.Linear(6, 6), nn.Linear(6, 2)
        self.read = read
        with torch.no_grad():
            self.bn.weight.uniform_(0.5, 1.5)
            self.bn.running_var.uniform_(0.5, 2.0)

    def forward(self, x):
        y = self.next(self.relu(self.bn(self.conv(x))))
        return self.two(self.relu(self.one(y))) + self.read(self)


@pytest.mark.parametrize("name", READS)
def test_numbers_that_the_forward_reads_stay(name, tmp_path):
    model, x = Reads(READS[name]).eval(), torch.randn(8, 3, 6)
    with torch.no_grad():
        wanted = torch.as_tensor(READS[name](model))
    qmodel = dq.quantize(model, w_bits=8, a_bits=8, deploy="integer")
    dq.calibrate(qmodel, [x])
    frozen = dq.freeze(qmodel)
    assert torch.equal(torch.as_tensor(READS[name](frozen)), wanted)
    with torch.no_grad():
        torch.testing.assert_close(frozen(x), qmodel(x), rtol=0, atol=0.1)
    dq.save(frozen, tmp_path / "artifact")
    assert torch.equal(dq.load(tmp_path / "artifact", model=Reads(READS[name]).eval())(x), frozen(x))
    assert dq.export(frozen, tmp_path / "model.onnx", x).agrees


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
