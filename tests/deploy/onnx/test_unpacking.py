"""Packed planes in an initializer, unpacked by standard operators: what ONNX Runtime reads is what was packed."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from daqconvert.deploy.onnx.runtime import OnnxModel
from daqconvert.deploy.onnx.unpacking import GraphWriter, add_weight
from daqconvert.functional import pack
from daqconvert.functional.grid import weight_operand

WIDTHS = [
    (bits, grid) for bits in range(1, 9) for grid in ("midrise", "integer", "twos") if bits > 1 or grid == "midrise"
]
SHAPES = [(4, 6), (3, 5, 3, 3), (1,), (2, 4, 1), (7, 1)]


def unpacking_model(codes: torch.Tensor, bits: int, grid: str) -> onnx.ModelProto:
    writer = GraphWriter()
    add_weight(writer, "w.weight_codes", codes.numpy(), bits, grid, "w.weight")
    output = helper.make_tensor_value_info("w.weight", TensorProto.FLOAT, list(codes.shape))
    graph = helper.make_graph(writer.nodes, "unpack", [], [output], list(writer.initializers.values()))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("bits", "grid"), WIDTHS)
def test_unpacked_is_the_operand(bits, grid, shape):
    codes = torch.randint(0, 2**bits, shape, dtype=torch.uint8)
    model = unpacking_model(codes, bits, grid)
    onnx.checker.check_model(model, full_check=True)
    found = OnnxModel(model.SerializeToString())()
    assert torch.equal(found, weight_operand(codes, bits, grid, torch.float32))


@pytest.mark.parametrize("bits", range(1, 9))
def test_initializer_holds_the_packed_bytes(bits):
    codes = torch.randint(0, 2**bits, (5, 7), dtype=torch.uint8)
    (planes,) = [t for t in unpacking_model(codes, bits, "midrise").graph.initializer if t.name == "w.weight_codes"]
    assert planes.data_type == TensorProto.UINT8
    assert list(planes.dims) == [bits, 1, 5]  # 35 codes: 5 bytes a plane
    assert numpy_helper.to_array(planes).tobytes() == pack(codes, bits).numpy().tobytes()


def test_constants_are_shared_between_weights():
    writer = GraphWriter()
    for name in ("a", "b"):
        add_weight(writer, f"{name}.weight_codes", np.zeros((4, 6), np.uint8), 3, "integer", f"{name}.weight")
    alone = GraphWriter()
    add_weight(alone, "a.weight_codes", np.zeros((4, 6), np.uint8), 3, "integer", "a.weight")
    assert len(writer.initializers) == len(alone.initializers) + 1
