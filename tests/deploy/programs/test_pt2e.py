"""A frozen model as one program of torch.export: every code of it is the frozen model's, in every dialect."""

import warnings

import pytest
import torch
import torchvision
from torch import nn

import daqconvert as dq
from daqconvert.deploy.comparing.probes import ModuleProbe
from daqconvert.deploy.onnx.lowering import float32_copy
from daqconvert.deploy.programs import DIALECTS, lower_frozen
from daqconvert.deploy.programs.pt2e import Writer
from daqconvert.deploy.signature import example_arguments


class Residual(nn.Module):
    """A sum, a concatenation, a clip, two poolings, a pad and two linears, of which one returns codes."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU6())
        self.second = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8))
        self.pool, self.activation = nn.MaxPool2d(2), nn.ReLU()
        self.third = nn.Conv2d(16, 8, 3, padding=1, padding_mode="reflect")
        self.head = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))

    def forward(self, x):
        a = self.first(x)
        b = self.activation(self.second(a) + a)
        return self.head(self.third(torch.cat([self.pool(a), self.pool(b)], 1)).mean((2, 3)))


def frozen_model(model, x, bits=8, target=None):
    torch.manual_seed(0)
    given = {"target": target} if target else {"deploy": "integer"}
    qmodel = dq.quantize(model.eval(), w_bits=bits, a_bits=bits, **given)
    dq.calibrate(qmodel, [x])
    return dq.freeze(qmodel)


def differing(frozen, x, dialect):
    """Return how many of the program's codes differ, of how many, and by how much the outputs do."""
    lowered = lower_frozen(float32_copy(frozen), example_arguments(x), None, dialect, watched=True)
    found = lowered.program.module()(x)
    own = ModuleProbe(frozen).run((x,), {}, set(lowered.layers))
    wrong = total = 0
    for layer, places in lowered.layers.items():
        for codes, place in zip(own.codes[layer], places, strict=True):
            grid = lowered.codes[place]
            again = torch.round(found[lowered.outputs + place] / grid.scale) + grid.zero_point
            wrong, total = wrong + int((again != codes).sum()), total + codes.numel()
    return wrong, total, float((found[0] - frozen(x)).abs().max())


@pytest.mark.parametrize("name", DIALECTS)
@pytest.mark.parametrize("bits", [8, 4])
def test_every_code_is_the_frozen_models(name, bits):
    torch.manual_seed(1)
    x = torch.randn(4, 3, 16, 16)
    frozen = frozen_model(Residual(), x, bits, "tensorrt" if name == "tensorrt" else None)
    wrong, total, apart = differing(frozen, x, DIALECTS[name])
    assert total > 10_000
    assert wrong == 0
    assert apart < 1e-5


@pytest.mark.parametrize("name", ["onnxruntime", "executorch"])
def test_every_code_of_mobilenet_v2(name):
    torch.manual_seed(0)
    x = torch.rand(1, 3, 64, 64)
    wrong, total, apart = differing(frozen_model(torchvision.models.mobilenet_v2(), x, 4), x, DIALECTS[name])
    assert (wrong, total > 500_000) == (0, True)
    assert apart < 1e-5


def calls(program):
    return [node for node in program.graph.nodes if node.op == "call_function"]


def test_dialects_differ_in_types_clips_biases_and_readers():
    x = torch.randn(4, 3, 16, 16)
    frozen = frozen_model(Residual(), x, 4)
    programs = {name: calls(dq.program(frozen, x, target=name)) for name in DIALECTS if name != "tensorrt"}
    quantize = torch.ops.quantized_decomposed.quantize_per_tensor.default
    for name, nodes in programs.items():
        types = {node.args[5] for node in nodes if node.target is quantize}
        assert types == {DIALECTS[name].codes}, name
    targets = {name: [node.target for node in nodes] for name, nodes in programs.items()}
    clips, clamp = torch.ops.aten.hardtanh.default, torch.ops.aten.clamp.default
    assert clamp in targets["onnxruntime"] and clips not in targets["onnxruntime"]
    assert clips in targets["executorch"] and clamp not in targets["executorch"]
    assert targets["qnn"].count(quantize) > targets["onnxruntime"].count(quantize)
    shared = [len(node.users) for node in programs["executorch"] if "dequantize_per_tensor" in node.name]
    assert set(shared) == {1}
    int32 = [node for node in programs["onnxruntime"] if node.args and node.args[-1] is torch.int32]
    assert len(int32) == 4  # three convolutions and the linear whose output is codes


def test_a_program_takes_another_batch_size():
    x = torch.randn(2, 3, 16, 16)
    frozen = frozen_model(Residual(), x)
    more = torch.randn(5, 3, 16, 16)
    assert (dq.program(frozen, x).module()(more)[0] - frozen(more)).abs().max() < 1e-5


def test_zero_points_that_tensorrt_cannot_hold_are_refused():
    x = torch.randn(4, 3, 16, 16)
    with pytest.raises(dq.ExportError, match=r'zero point 0. Quantize the float model with target="tensorrt"'):
        dq.program(frozen_model(Residual(), x), x, target="tensorrt")


def test_what_has_no_program_is_refused():
    x = torch.randn(4, 3, 16, 16)
    frozen = frozen_model(Residual(), x)
    with pytest.raises(dq.ExportError, match=r"'tensort' has no dialect. Nearest: tensorrt"):
        dq.program(frozen, x, target="tensort")
    with pytest.raises(dq.ExportError, match=r"'packed' has no dialect"):
        dq.program(frozen, x, target="packed")
    qmodel = dq.quantize(Residual().eval())
    dq.calibrate(qmodel, [x])
    with pytest.raises(dq.ExportError, match=r'Residual has no layer whose output is codes.*deploy="integer"'):
        dq.program(dq.freeze(qmodel), x)


def test_a_program_is_made_without_a_warning():
    x = torch.randn(4, 3, 16, 16)
    frozen = frozen_model(Residual(), x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dq.program(frozen, x)


class Attention(nn.Module):
    """Products of two activations, and values whose memory is copied before their shape changes."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(1, 2).transpose(1, 2).mT).softmax(-1)
        return self.out((scores @ v).transpose(1, 2).contiguous().view(x.shape))


class Encoder(nn.TransformerEncoderLayer):
    """torch's own block, whose biases are parts of one parameter."""

    def __init__(self):
        super().__init__(16, 4, 32, batch_first=True)


class Padded(nn.Module):
    """Operands that are moved between a layer's rounding and its products."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular")
        self.up = nn.ConvTranspose2d(8, 6, 3, stride=2, groups=2)
        self.same = nn.Conv2d(6, 4, 3, padding="same")
        self.last = nn.Conv1d(4, 5, 3, padding=1, padding_mode="replicate")

    def forward(self, x):
        return self.last(self.same(self.up(self.first(x).relu())).flatten(2))


@pytest.mark.parametrize("name", ["onnxruntime", "executorch"])
@pytest.mark.parametrize("make, shape", [(Attention, (2, 5, 16)), (Encoder, (2, 5, 16)), (Padded, (2, 3, 12, 12))])
def test_products_of_activations_moved_operands_and_copies(name, make, shape):
    torch.manual_seed(0)
    model, x = make().eval(), torch.randn(shape)
    qmodel = dq.quantize(model, deploy="integer", attention=None if make is Padded else 8)
    dq.calibrate(qmodel, [x])
    with torch.no_grad():
        frozen = dq.freeze(qmodel)
        lowered = lower_frozen(float32_copy(frozen), example_arguments(x), None, DIALECTS[name])
        wanted = frozen(x)
        assert (lowered.program.module()(x)[0] - wanted).abs().max() < 1e-4 * wanted.abs().max()


class Turned(nn.Module):
    """An operand that is turned before a product with a float weight, as the operators of `frozen_operators`."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.tensor(0.25))
        self.register_buffer("zero_point", torch.tensor(3, dtype=torch.uint8))
        self.register_buffer("weight", torch.randn(4, 5))

    def forward(self, x):
        operand = torch.ops.daqconvert.input_operand(x, self.scale, self.zero_point, 8, "turned")
        return (torch.ops.daqconvert.rescale(operand.mT @ self.weight, self.scale, None, 0, "turned"),)


def test_an_operand_that_is_moved_stays_in_integers():
    module, x = Turned(), torch.randn(4, 6)
    traced = torch.export.export(module, (x,), strict=False).run_decompositions({})
    assert torch.allclose(Writer(traced, DIALECTS["onnxruntime"]).write(watched=False)(x)[0], module(x)[0])
