"""Names of inputs and outputs: whatever a model calls its arguments and what it returns, the file keeps them apart."""

import dataclasses
import math
from collections import OrderedDict, namedtuple

import onnx
import pytest
import torch
from torch import nn

import daqconvert as dq
from daqconvert.deploy import OnnxModel
from daqconvert.deploy.signature import distinct, input_names, left_out, output_names, output_tensors
from daqconvert.errors import ExportError

Pair = namedtuple("Pair", "logits hidden")


@dataclasses.dataclass
class Named:
    """As the results of many libraries."""

    logits: torch.Tensor
    hidden: torch.Tensor
    loss: torch.Tensor | None = None


class Output(OrderedDict):
    """A mapping of a class of its own."""


class Returning(nn.Module):
    """Returns what `make` makes of its output and its input."""

    def __init__(self, make=lambda y, x: y):
        super().__init__()
        self.a, self.b, self.make = nn.Linear(8, 8), nn.Linear(8, 4), make

    def forward(self, x):
        return self.make(self.b(torch.relu(self.a(x))), x)


class WithTensors(Returning):
    """A parameter and a buffer with the names of what the file has."""

    def __init__(self):
        super().__init__()
        self.output = nn.Parameter(torch.randn(4))
        self.register_buffer("input_codes", torch.randn(4))
        self.daq = nn.Module()
        self.daq.masks = nn.Parameter(torch.randn(4))

    def forward(self, x):
        return super().forward(x) * self.output + self.input_codes + self.daq.masks


class Argument(Returning):
    """Its argument has the name of the output."""

    def forward(self, output):
        return super().forward(output)


class Root(nn.Linear):
    """A layer that is the whole model; its arguments have the names of the layer's own tensors in the file."""

    def forward(self, x, scale, weight_codes):
        return nn.functional.linear(x * scale, self.weight, self.bias) * weight_codes


class Keywords(Returning):
    """Takes any names."""

    def forward(self, **given):
        return super().forward(given["a.b"] - given["a_b"])


RESULTS = {
    "dotted": (lambda y, x: {"a.b": y, "a_b": y + 1}, ["output_a.b", "output_a_b"]),
    "int": (lambda y, x: (y, 3), ["output"]),
    "size": (lambda y, x: (y, x.shape[0]), ["output"]),
    "plain values": (lambda y, x: {"y": y, "flag": True, "share": 0.5, "text": "s", "none": None}, ["output"]),
    "the same twice": (lambda y, x: (y, y), ["output_0", "output_1"]),
    "the input": (lambda y, x: (y, x), ["output_0", "output_1"]),
    "the input twice": (lambda y, x: (x, y, x), ["output_0", "output_1", "output_2"]),
    "nested": (lambda y, x: {"p": [y, (y + 1, {"q": y})]}, ["output_p_0", "output_p_1_0", "output_p_1_1_q"]),
    "numbered": (lambda y, x: {0: y, 1: -y}, ["output_0", "output_1"]),
    "dataclass": (lambda y, x: Named(y, y + 1), ["output_logits", "output_hidden"]),
    "named tuple": (lambda y, x: Pair(y, y + 1), ["output_logits", "output_hidden"]),
    "mapping": (lambda y, x: Output(logits=y, hidden=y + 1), ["output_logits", "output_hidden"]),
    "alike": (lambda y, x: {"a": y, "a_1": y + 1, "a.1": y + 2}, ["output_a", "output_a_1", "output_a.1"]),
}


def frozen(model, batch, **settings):
    qmodel = dq.quantize(model.eval(), **{"w_bits": 4, "a_bits": 8, "first": (4, 8), "last": (4, 8)} | settings)
    dq.calibrate(qmodel, [batch])
    return dq.freeze(qmodel)


def exported(model, batch, path):
    """Export, and return the report and the file; it computes what the model computes, at another batch size too."""
    report = dq.export(model, path, batch)
    assert report.agrees, str(report)
    with torch.no_grad():
        more = {k: torch.cat([v, v, v]) if v.shape[:1] == (4,) and v.dim() > 1 else v for k, v in batch.items()}
        wanted = output_tensors(model(**more))
    file = OnnxModel(path)
    found = file.run((), more)
    assert [t.shape for t in found] == [t.shape for t in wanted]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(wanted, found, strict=True))
    return report, file


@pytest.mark.parametrize("name", RESULTS)
def test_any_result(name, tmp_path):
    make, names = RESULTS[name]
    x = torch.randn(4, 8)
    report, file = exported(frozen(Returning(make), {"x": x}), {"x": x}, tmp_path / "model.onnx")
    assert (file.input_names, file.output_names) == (["x"], names)
    said = [note for note in report.notes if note.startswith("not in the file")]
    expected = {
        "int": "[1] (int)",
        "size": "[1] (int)",
        "plain values": "['flag'] (bool), ['share'] (float), ['text'] (str)",
    }
    assert said == ([f"not in the file, which holds tensors alone: {expected[name]}"] if name in expected else [])


@pytest.mark.parametrize("name", RESULTS)
def test_any_result_as_a_program(name, tmp_path):
    x = torch.randn(4, 8)
    model = frozen(Returning(RESULTS[name][0]), {"x": x})
    report = dq.export(model, tmp_path / "model.pt2", x)
    assert report.agrees, str(report)
    assert "forward" not in vars(model)
    again, other = torch.export.load(tmp_path / "model.pt2").module(), torch.randn(3, 8)
    with torch.no_grad():
        wanted, found = model(other), again(other)
    assert all(torch.equal(a, b) for a, b in zip(output_tensors(wanted), output_tensors(found), strict=True))
    if name in ("dataclass", "named tuple", "mapping"):
        assert list(found)[:2] == ["logits", "hidden"]
        assert any("are dicts in what the program returns" in note for note in report.notes)
    if name == "plain values":
        assert (found["flag"], found["share"], found["text"]) == (True, 0.5, None)
        assert any("they are None" in note for note in report.notes)
    if name == "size":
        assert found[1] == 3


@pytest.mark.parametrize("deploy", ["float", "integer"])
def test_parameters_and_buffers_with_names_of_the_file(deploy, tmp_path):
    x = torch.randn(4, 8)
    _, file = exported(frozen(WithTensors(), {"x": x}, deploy=deploy), {"x": x}, tmp_path / "model.onnx")
    assert (file.input_names, file.output_names) == (["x"], ["output"])
    names = [t.name for t in onnx.load(tmp_path / "model.onnx").graph.initializer]
    assert {"input_codes", "daq.masks", "daq.masks_1", "output_1"} <= set(names)
    assert len(names) == len(set(names))


def test_an_argument_called_output(tmp_path):
    x = torch.randn(4, 8)
    _, file = exported(frozen(Argument(), {"output": x}), {"output": x}, tmp_path / "model.onnx")
    assert (file.input_names, file.output_names) == (["output"], ["output_1"])


@pytest.mark.parametrize("deploy", ["float", "integer"])
def test_arguments_with_names_of_a_layer(deploy, tmp_path):
    batch = {"x": torch.randn(4, 8), "scale": torch.rand(8), "weight_codes": torch.rand(4)}
    model = frozen(Root(8, 4), batch, deploy=deploy)
    report, file = exported(model, batch, tmp_path / "model.onnx")
    assert file.input_names == list(batch)
    assert [layer.differing for layer in report.layers] == [0]
    assert dq.verify(model, tmp_path / "model.onnx", [batch]).layers[0].sqnr > 100


def test_keywords_with_dots(tmp_path):
    batch = {"a.b": torch.randn(4, 8), "a_b": torch.randn(4, 8)}
    model = frozen(Keywords(), batch)
    _, file = exported(model, batch, tmp_path / "model.onnx")
    assert file.input_names == ["a.b", "a_b"]
    with pytest.raises(ExportError, match=r"has no argument 'a\.b': it is no name in Python"):
        dq.export(model, tmp_path / "model.pt2", batch)


def test_a_result_without_a_tensor(tmp_path):
    x = torch.randn(4, 8)
    for name in ("model.onnx", "model.pt2"):
        with pytest.raises(ExportError, match="Returning returns no tensor: expected tensors.* found int"):
            dq.export(frozen(Returning(lambda y, x: 3), {"x": x}), tmp_path / name, x)
    assert not list(tmp_path.iterdir())


def test_names_of_nested_inputs():
    class Nested(nn.Module):
        def forward(self, x, pair, *rest, table=None):
            return x

    a, b = torch.zeros(1), torch.zeros(2)
    names = input_names(Nested(), ((a, {"k.l": a, "k_l": b, "other.one": a}, 3, b), {"table": [a, b]}))
    assert names == ["x", "pair_k.l", "pair_k_l", "pair_other_one", "rest_1", "table_0", "table_1"]
    assert output_names([a, 3, {"b": b}]) == ["output_0", "output_2_b"]
    assert left_out((a, math.pi, None)) == ["[1] (float)"]
    assert distinct(["a", "a", "a_1"]) == ["a", "a_2", "a_1"]
