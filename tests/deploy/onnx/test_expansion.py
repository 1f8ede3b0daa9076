"""What the file holds: packed bytes under dotted names, standard operators that fold, nothing of this machine."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import nn

import daqconvert as dq
from daqconvert.functional import pack
from daqconvert.layers import FrozenLayer

UNPACKING = {"BitwiseAnd", "BitwiseOr", "Where", "Split"}
WIDTHS = [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (6, 6), (7, 7), (8, 8)]


@pytest.fixture(scope="module")
def every_width(tmp_path_factory):
    """A chain whose layers have 1 to 8 bits, and its file: one export for all tests here."""
    torch.manual_seed(0)
    layers = [part for _ in WIDTHS for part in (nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())]
    model, x = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * 36, 10)), torch.rand(8, 16, 6, 6)
    with torch.no_grad():
        model(x)
    names = [str(3 * i) for i in range(len(WIDTHS))]
    rules = [dq.Rule({"w_bits": w, "a_bits": a}, match=name) for name, (w, a) in zip(names, WIDTHS, strict=True)]
    qmodel = dq.quantize(model.eval(), rules=[dq.Rule({"w_bits": 2, "a_bits": 4}, type="Linear"), *rules])
    dq.calibrate(qmodel, [x])
    frozen = dq.freeze(qmodel)
    path = tmp_path_factory.mktemp("widths") / "model.onnx"
    report = dq.export(frozen, path, x)
    return frozen, path, report, x


def initializers(path):
    return {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}


def layers_of(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, FrozenLayer)}


def test_every_width_agrees(every_width):
    frozen, _, report, _ = every_width
    assert [layer.settings.w_bits for layer in layers_of(frozen).values()] == [1, 2, 3, 4, 5, 6, 7, 8, 2]
    assert report.agrees, str(report)
    assert len(report.layers) == 9


def test_weights_are_packed_as_documented(every_width):
    frozen, path, _, _ = every_width
    found = initializers(path)
    for name, layer in layers_of(frozen).items():
        expected = pack(layer.weight_codes, layer.settings.w_bits).numpy()
        assert found[f"{name}.weight_codes"].tobytes() == expected.tobytes(), name
        assert found[f"{name}.weight_codes"].dtype == np.uint8


def test_everything_else_stands_under_its_dotted_name(every_width):
    frozen, path, _, _ = every_width
    found = initializers(path)
    for name, layer in layers_of(frozen).items():
        for key in ("scale", "bias", "input_scale", "input_zero_point"):
            assert np.array_equal(found[f"{name}.{key}"].reshape(-1), getattr(layer, key).reshape(-1)), (name, key)


def test_size_is_that_of_the_bits(every_width):
    frozen, path, report, _ = every_width
    packed = sum(m.settings.w_bits * -(-m.weight_codes.numel() // 8) for m in layers_of(frozen).values())
    rest = 4 * sum(t.numel() for t in frozen.state_dict().values() if t.is_floating_point())
    assert report.file_bytes == path.stat().st_size
    assert packed + rest < report.file_bytes < packed + rest + 3000 * len(report.layers)


def test_unpacking_is_folded_at_load(every_width, optimized):
    _, path, _, _ = every_width
    before = {node.op_type for node in onnx.load(path).graph.node}
    assert before >= UNPACKING
    after = optimized(path).graph
    kinds = [node.op_type for node in after.node]
    assert not UNPACKING & set(kinds)
    weights = {t.name: t for t in after.initializer}
    for node in after.node:
        if node.op_type in ("Conv", "Gemm", "MatMul"):
            assert weights[node.input[1]].data_type == TensorProto.FLOAT
    assert kinds.count("Conv") == 8
    # ONNX Runtime must not have quantized the weights and biases a second time, by a rule of its own
    assert not {"QLinearConv", "DequantizeLinear"} & set(kinds)


def test_batch_norm_is_not_folded_in_the_file(every_width):
    frozen, path, _, _ = every_width
    nodes = [node.op_type for node in onnx.load(path).graph.node]
    assert nodes.count("BatchNormalization") == sum(isinstance(m, nn.BatchNorm2d) for m in frozen.modules())


def test_only_standard_operators_of_opset_21(every_width):
    _, path, _, _ = every_width
    model = onnx.load(path)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 21)]
    assert {node.domain for node in model.graph.node} == {""}
    assert not model.functions
    onnx.checker.check_model(model, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    shapes = {v.name: v.type.tensor_type.shape for v in inferred.graph.value_info}
    assert [d.dim_value for d in shapes["0.weight"].dim] == [16, 16, 3, 3]


def test_nothing_of_this_machine_is_in_the_file(every_width):
    _, path, _, _ = every_width
    content = path.read_bytes()
    for trace in (Path(torch.__file__).parent.parent, Path(dq.__file__).parent, Path.home()):
        assert str(trace).encode() not in content
    assert b"stack_trace" not in content


def test_codes_can_be_read_in_plain_onnx_runtime(every_width):
    frozen, path, _, x = every_width
    model = onnx.load(path)
    (entry,) = [p for p in model.metadata_props if p.key == "daqconvert.layers"]
    (name,) = json.loads(entry.value)["0"]["codes"]
    model.graph.output.append(onnx.helper.make_tensor_value_info(name, TensorProto.UINT8, None))
    session = onnxruntime.InferenceSession(model.SerializeToString())
    codes = session.run([name], {session.get_inputs()[0].name: x.numpy()})[0]
    assert np.array_equal(codes, frozen[0].input_codes(x).numpy())


def test_tensors_that_the_exporter_merges_keep_their_own_shapes(frozen, tmp_path):
    """A bias of zeros equals a batch norm's: torch stores them once, but they stand in different shapes here."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    nn.init.zeros_(model[0].bias)
    nn.init.zeros_(model[3].bias)
    x = torch.randn(4, 3, 5, 5)
    assert dq.export(frozen(model, x), tmp_path / "model.onnx", x).agrees
