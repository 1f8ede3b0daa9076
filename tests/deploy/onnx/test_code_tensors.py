"""What stands between two layers of integer codes stays in float in ONNX Runtime, wherever integers would differ."""

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import daqconvert as dq

LEVELS = ["ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_LAYOUT", "ORT_ENABLE_ALL"]
IN_FLOAT = [{"match": "between*", "w_bits": 32, "a_bits": 32, "optional": True}]
WEIGHT_ONLY = [{"match": "between*", "a_bits": 32, "optional": True}]


class Between(nn.Module):
    """An operator between one or two convolutions and another layer, all three with 8-bit codes."""

    def __init__(self, operator, parts: int = 1, between: nn.Module | None = None, after: nn.Module | None = None):
        super().__init__()
        self.before = nn.ModuleList(nn.Conv2d(3, 8, 3, padding=1) for _ in range(parts))
        self.operator, self.between = operator, nn.Identity() if between is None else between
        self.after = nn.Conv2d(8, 4, 3, padding=1) if after is None else after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.between(self.operator(*[layer(x) for layer in self.before])))


class FixedFilter(nn.Module):
    """A convolution with a filter that is no parameter, as in a blur pool."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("filter", torch.rand(8, 1, 3, 3) / 9)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.filter, padding=1, groups=8)


# kernels of ONNX Runtime that compute with integers and round in a way of their own
INTEGER_KERNELS = {
    "QLinearSoftmax", "QLinearMul", "QLinearAveragePool", "QLinearGlobalAveragePool", "QLinearMatMul", "QGemm",
}  # fmt: skip


def kinds_of_nodes(path, tmp_path, level="ORT_ENABLE_ALL"):
    """Open a file with a level of optimization: return the kinds of nodes that run, and the session."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node], session


def codes_that_differ(model, x, tmp_path, rules=(), deploy="integer"):
    """Convert, export and compare: the number of codes that differ in the file, which must agree."""
    qmodel = dq.quantize(model.eval(), w_bits=8, a_bits=8, deploy=deploy, rules=list(rules))
    dq.calibrate(qmodel, [x])
    report = dq.export(dq.freeze(qmodel), tmp_path / "model.onnx", x)
    assert report.agrees and len(report.layers) >= 2, str(report)
    assert not INTEGER_KERNELS & set(kinds_of_nodes(tmp_path / "model.onnx", tmp_path)[0])
    return sum(max(layer.differing, layer.differing_same) for layer in report.layers)


# all that ONNX Runtime's selectors of integer kernels name, and what moves values without computing
CHOSEN = {
    "softmax": lambda x: x.softmax(1),
    "softmax of the last": lambda x: x.softmax(-1),
    "sigmoid": lambda x: x.sigmoid(),
    "leaky_relu": lambda x: F.leaky_relu(x, 0.1),
    "avg_pool2d": lambda x: F.avg_pool2d(x, 3, 2, 1),
    "global average": lambda x: F.adaptive_avg_pool2d(x, 1),
    "mean": lambda x: x.mean((2, 3), keepdim=True),
    "amax": lambda x: x.amax((2, 3), keepdim=True),
    "nearest": lambda x: F.interpolate(x, scale_factor=2.0),
    "bilinear": lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=True),
    "where": lambda x: torch.where(x > 0, x, x * 0.5),
    "masked_fill": lambda x: x.masked_fill(x > 0.5, 0.25),
    "square": lambda x: x * x,
    "split": lambda x: torch.cat(x.chunk(2, 1)[::-1], 1),
    "gather": lambda x: x[:, [1, 0, 3, 2, 5, 4, 7, 6]],
    "expand": lambda x: x[:, :, :1].expand(-1, -1, 8, -1),
    "tile": lambda x: x[:, :4].repeat(1, 2, 1, 1),
    "relu": lambda x: F.relu(x) * 0.7,
    "clamp": lambda x: x.clamp(-0.3, 0.4),
}
OTHER = {
    "log_softmax": lambda x: x.log_softmax(1),
    "hardsigmoid": lambda x: F.hardsigmoid(x),
    "hardswish": lambda x: F.hardswish(x),
    "silu": lambda x: F.silu(x),
    "gelu": lambda x: F.gelu(x),
    "tanh": lambda x: x.tanh(),
    "elu": lambda x: F.elu(x),
    "square root": lambda x: (x.abs() + 0.1).sqrt(),
    "times": lambda x: x * 1.7,
    "plus": lambda x: x + 0.3,
    "group_norm": lambda x: F.group_norm(x, 2),
    "layer_norm": lambda x: F.layer_norm(x, x.shape[2:]),
    "pixel_shuffle": lambda x: F.pixel_shuffle(F.pixel_unshuffle(x, 2), 2),
    "flip": lambda x: x.flip(3),
    "cumsum": lambda x: x.cumsum(1),
    "normalize": lambda x: F.normalize(x),
}
TWO = {
    "add": lambda x, y: x + y,
    "mul": lambda x, y: x * y,
    "sub": lambda x, y: x - y,
    "div": lambda x, y: x / (y.abs() + 1),
    "cat": lambda x, y: torch.cat([x, y], 1)[:, ::2],
    "maximum": lambda x, y: torch.maximum(x, y),
    "where": lambda x, y: torch.where(x > y, x, y),
    "matmul": lambda x, y: x @ y.transpose(2, 3),
    "attention": lambda x, y: F.scaled_dot_product_attention(x, y, y),
}


@pytest.mark.parametrize(
    "operator",
    [*(pytest.param(CHOSEN[name], id=name) for name in CHOSEN)]
    + [pytest.param(OTHER[name], id=name, marks=pytest.mark.slow) for name in OTHER],
)
def test_an_operator_between_two_layers(operator, tmp_path):
    assert codes_that_differ(Between(operator), torch.randn(8, 3, 8, 8), tmp_path) == 0


@pytest.mark.parametrize("name", TWO)
def test_an_operator_on_two_layers(name, tmp_path):
    assert codes_that_differ(Between(TWO[name], parts=2), torch.randn(8, 3, 8, 8), tmp_path) == 0


LAYERS = {
    "convolution": lambda: nn.Conv2d(8, 8, 3, padding=1),
    "depthwise, no bias": lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
    "transposed": lambda: nn.ConvTranspose2d(8, 8, 3, padding=1),
    "batch norm and ReLU": lambda: nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
    "linear": lambda: nn.Linear(8, 8),
    "fixed filter": FixedFilter,
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("rules", [pytest.param(IN_FLOAT, id="float"), pytest.param(WEIGHT_ONLY, id="weight alone")])
def test_a_layer_in_float_between_two_layers(name, rules, tmp_path):
    network = Between(lambda x: x, between=LAYERS[name]())
    assert codes_that_differ(network, torch.randn(8, 3, 8, 8), tmp_path, rules) == 0


def test_a_linear_of_two_dimensions_in_float(tmp_path):
    network = Between(lambda x: x.flatten(1), between=nn.Linear(8 * 64, 16), after=nn.Linear(16, 4))
    assert codes_that_differ(network, torch.randn(8, 3, 8, 8), tmp_path, IN_FLOAT) == 0


def test_linears_without_bias_in_a_row(tmp_path):
    # a MatMul right before a quantizer would be rounded by ONNX Runtime's own integer arithmetic
    network = nn.Sequential(nn.Linear(32, 64, bias=False), nn.Linear(64, 64, bias=False), nn.Linear(64, 4))
    assert codes_that_differ(network, torch.randn(16, 16, 32), tmp_path, deploy="float") == 0
    assert kinds_of_nodes(tmp_path / "model.onnx", tmp_path)[0].count("MatMulIntegerToFloat") == 3


class Everything(nn.Module):
    """The operators that ONNX Runtime would compute with integers, each between two layers, and a layer in float."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3 if i == 0 else 8, 8, 3, padding=1) for i in range(5))
        self.between = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[1](self.layers[0](x).softmax(1))
        x = self.layers[2](F.avg_pool2d(x, 2))
        x = self.layers[3](self.between(x))
        return self.layers[4](x * x)


@pytest.mark.parametrize("level", LEVELS)
def test_every_level_of_optimization_gives_the_same_codes(level, tmp_path):
    model, x = Everything().eval(), torch.randn(8, 3, 12, 12)
    qmodel = dq.quantize(model, w_bits=8, a_bits=8, deploy="integer", rules=IN_FLOAT)
    dq.calibrate(qmodel, [x])
    frozen = dq.freeze(qmodel)
    dq.export(frozen, tmp_path / "model.onnx", x)
    kinds, session = kinds_of_nodes(tmp_path / "model.onnx", tmp_path, level)
    assert not INTEGER_KERNELS & set(kinds) and {"Softmax", "Mul", "AveragePool"} <= set(kinds)
    # the output is on a grid of 8 bits: one code that differs would show
    assert torch.equal(torch.from_numpy(session.run(None, {"x": x.numpy()})[0]), frozen(x))


class Sum(nn.Module):
    """A sum of two layers and a ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.relu = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.a(x))
        return self.relu(y + self.b(y))


class TwoReaders(nn.Module):
    """A quantized sum that is read by two layers with quantizers of a grid of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.sum, self.c, self.d = Sum(), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.sum(x)
        return self.c(y) + self.d(y)


def test_two_grids_in_a_row_stay_two(tmp_path):
    qmodel = dq.quantize(TwoReaders().eval(), w_bits=8, a_bits=8, deploy="integer")
    x = torch.randn(4, 3, 8, 8)
    dq.calibrate(qmodel, [x])
    with torch.no_grad():
        for reader in (qmodel.c, qmodel.d):
            reader.input_quantizer.upper.mul_(0.83)
    frozen = dq.freeze(qmodel)
    assert frozen.sum.output_quantizer.input_scale != frozen.c.input_scale
    report = dq.export(frozen, tmp_path / "model.onnx", x)
    assert report.agrees and report.largest_difference == 0.0, str(report)
