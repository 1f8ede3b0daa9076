"""Every kind of layer as ONNX: the file agrees with the frozen model, code by code, at other batch sizes too."""

import json

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import daqconvert as dq
from daqconvert.layers import FrozenLayer


class Twice(nn.Module):
    """One convolution, called twice."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 4)

    def forward(self, x):
        return self.head(self.conv(torch.relu(self.conv(x))).mean((2, 3)))


class Attention(nn.Module):
    """Five linears that read, and quantize, the same tensor."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.gate, self.other, self.out = (nn.Linear(6, 6) for _ in range(6))

    def forward(self, x):
        mixed = torch.softmax(self.q(x) @ self.k(x).transpose(1, 2), -1) @ self.v(x)
        return self.out(mixed * torch.sigmoid(self.gate(x)) + self.other(x))


class Branches(nn.Module):
    """Keyword inputs, one of them no batch of images; outputs in a dict."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, image, gain):
        hidden = self.a(image) * gain
        return {"logits": self.b(hidden), "hidden": [hidden, hidden + 1]}


def convs(*layers):
    """Return convolutions with a ReLU between them."""
    return nn.Sequential(*[part for layer in layers for part in (layer, nn.ReLU())][:-1])


def three():
    """Return three plain convolutions."""
    return convs(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1))


CASES = {
    "dilated, grouped, depthwise": (
        lambda: convs(
            nn.Conv2d(4, 8, 3, padding="same", dilation=2),
            nn.Conv2d(8, 12, 3, stride=2, groups=4),
            nn.Conv2d(12, 12, 3, groups=12, bias=False),
        ),
        {},
    ),
    "signed inputs": (lambda: nn.Sequential(nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)), {}),
    "padding modes": (
        lambda: convs(*(nn.Conv2d(4, 4, 3, padding=2, padding_mode=m) for m in ("reflect", "replicate", "circular"))),
        {},
    ),
    "per tensor": (three, {"granularity": "tensor"}),
    "weights alone": (three, {"a_bits": None}),
    "inputs alone": (three, {"w_bits": None}),
    "float ends": (three, {"first": None, "last": None}),
    "transposed": (
        lambda: convs(nn.ConvTranspose2d(4, 8, 3, stride=2, output_padding=1), nn.ConvTranspose2d(8, 6, 3, groups=2)),
        {},
    ),
}


def check(model, x, path, others=None):
    """Export, and compare at a batch size that torch did not see; return the report."""
    report = dq.export(model, path, x)
    assert report.agrees, str(report)
    assert sum(layer.differing_same for layer in report.layers) == 0, str(report)
    compared = dq.verify(model, path, [torch.cat([x, x, x]) if others is None else others])
    assert compared.first_difference is None
    assert compared.sqnr > 100  # float32 rounding alone: the codes are the same
    assert len(compared.layers) == sum(isinstance(m, FrozenLayer) for m in model.modules())
    return report


@pytest.mark.parametrize("name", CASES)
def test_convolutions(name, frozen, tmp_path):
    make, settings = CASES[name]
    x = torch.randn(4, 4, 9, 9)
    check(frozen(make(), x, **settings), x, tmp_path / "model.onnx")


@pytest.mark.parametrize("dims", [1, 3])
def test_other_dimensions(dims, frozen, tmp_path):
    conv, transposed = (getattr(nn, f"{kind}{dims}d") for kind in ("Conv", "ConvTranspose"))
    x = torch.randn(2, 3, *(6,) * dims)
    check(frozen(convs(conv(3, 4, 3), transposed(4, 3, 3)), x), x, tmp_path / "model.onnx")


def test_module_called_twice(frozen, tmp_path):
    x = torch.randn(2, 3, 8, 8)
    report = check(frozen(Twice(), x), x, tmp_path / "model.onnx")
    assert {layer.name: layer.elements for layer in report.layers} == {"conv": 2 * x.numel(), "head": 2 * 3}
    graph = onnx.load(tmp_path / "model.onnx").graph
    assert [t.name for t in graph.initializer if "codes" in t.name] == ["conv.weight_codes", "head.weight_codes"]


def test_only_equal_quantizers_of_one_tensor_are_written_once(frozen, tmp_path):
    x = torch.randn(2, 5, 6)
    model = frozen(Attention(), x, rules=[dq.Rule({"a_bits": 6}, match="gate")])
    model.other.input_scale.mul_(1.5)
    report = check(model, x, tmp_path / "model.onnx")
    assert [layer.name for layer in report.layers] == ["q", "k", "v", "gate", "other", "out"]
    nodes = [node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node]
    assert nodes.count("QuantizeLinear") == 4  # that of q, k and v; one for each of the others


def test_root_layer(frozen, tmp_path):
    x = torch.randn(4, 5)
    model = frozen(nn.Linear(5, 3), x)
    check(model, x, tmp_path / "model.onnx")
    names = {t.name for t in onnx.load(tmp_path / "model.onnx").graph.initializer}
    assert {"weight_codes", "scale", "bias", "input_scale", "input_zero_point"} <= names


def test_keyword_inputs_and_nested_outputs(frozen, tmp_path):
    batch = {"image": torch.randn(4, 4), "gain": torch.rand(4, 1)}
    model = frozen(Branches(), batch)
    more = {name: torch.cat([value, value]) for name, value in batch.items()}
    check(model, batch, tmp_path / "model.onnx", others=more)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    assert {i.name for i in session.get_inputs()} == {"image", "gain"}
    assert [o.name for o in session.get_outputs()] == ["output_logits", "output_hidden_0", "output_hidden_1"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes_are_exported_in_float32(dtype, frozen, tmp_path):
    x = torch.randn(4, 3, 8, 8).to(dtype)
    model = frozen(convs(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)).to(dtype), x)
    report = dq.export(model, tmp_path / "model.onnx", x)
    assert report.agrees, str(report)
    assert report.notes == (f"{str(dtype).removeprefix('torch.')} was exported, and compared, in float32",)
    assert onnxruntime.InferenceSession(tmp_path / "model.onnx").get_inputs()[0].type == "tensor(float)"
    assert model[0].dtype == dtype
    assert model(x).dtype == dtype


def test_model_is_unchanged_and_report_is_complete(frozen, chain, images, tmp_path):
    model, path = frozen(chain, images), tmp_path / "model.onnx"
    before, state = model(images), {k: v.clone() for k, v in model.state_dict().items()}
    report = dq.export(model, path, images)
    assert torch.equal(model(images), before)
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert not any(m.qdq for m in model.modules() if isinstance(m, FrozenLayer))
    assert f"{path}: {path.stat().st_size:,} bytes" in str(report)
    assert str(report).endswith("ONNX Runtime, 8 samples: agrees")
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert data["agrees"] is True
    assert [layer["name"] for layer in data["layers"]] == ["0", "3", "8"]
    assert data["class_agreement"] == 1.0


def test_open_batch_from_a_single_example(frozen, chain, images, tmp_path):
    model = frozen(chain, images)
    report = dq.export(
        model, tmp_path / "model.onnx", images[:1], check_batches=[images, (images[:3], torch.zeros(3))]
    )
    assert (report.samples, report.agrees) == (1 + 8 + 3, True)
    (given,) = onnxruntime.InferenceSession(tmp_path / "model.onnx").get_inputs()
    assert given.shape == ["batch", 3, 10, 10]


def test_fixed_batch(frozen, chain, images, tmp_path):
    dq.export(frozen(chain, images), tmp_path / "model.onnx", images[:2], dynamic_batch=False)
    (given,) = onnxruntime.InferenceSession(tmp_path / "model.onnx").get_inputs()
    assert given.shape == [2, 3, 10, 10]
