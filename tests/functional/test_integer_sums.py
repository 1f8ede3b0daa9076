"""Sums of codes: where every way to round agrees, ONNX Runtime's integer kernel is held against all pairs of codes."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from daqconvert.functional.integer import APART, TRIES, CodeGrid, agreeing_scale, sums_agree

CASES = range(24)


def grids(seed):
    rng = np.random.default_rng(seed)
    a, b = (CodeGrid(float(np.float32(s)), int(z)) for s, z in zip(rng.uniform(1e-3, 0.1, 2), rng.integers(0, 256, 2)))  # noqa: B905
    scale = float(np.float32(max(a.scale, b.scale) * rng.uniform(0.7, 2.2)))
    return a, b, CodeGrid(scale, int(rng.integers(0, 256)))


def by_onnxruntime(a, b, y, folder):
    """All pairs of codes through `Add` between quantized values; the kernel must be the integer one."""
    parts = {"a": a, "b": b, "y": y}
    values = {f"{key}_scale": np.float32(grid.scale) for key, grid in parts.items()}
    values |= {f"{key}_zero": np.uint8(grid.zero_point) for key, grid in parts.items()}
    nodes = [
        *(helper.make_node("DequantizeLinear", [k, f"{k}_scale", f"{k}_zero"], [f"{k}_real"]) for k in "ab"),
        helper.make_node("Add", ["a_real", "b_real"], ["sum"]),
        helper.make_node("QuantizeLinear", ["sum", "y_scale", "y_zero"], ["y"]),
    ]
    inputs = [helper.make_tensor_value_info(k, TensorProto.UINT8, [256, 256]) for k in "ab"]
    outputs = [helper.make_tensor_value_info("y", TensorProto.UINT8, [256, 256])]
    constants = [numpy_helper.from_array(np.asarray(v), k) for k, v in values.items()]
    graph = helper.make_graph(nodes, "sum", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(folder / "optimized.onnx"), 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    assert [node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node] == ["QLinearAdd"]
    x, z = np.meshgrid(np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8), indexing="ij")
    return session.run(None, {"a": x, "b": z})[0]


def as_frozen(a, b, y):
    codes = torch.arange(256, dtype=torch.float32)
    left = (codes - a.zero_point) * torch.tensor(a.scale)
    right = (codes - b.zero_point) * torch.tensor(b.scale)
    rounded = torch.round((left[:, None] + right[None, :]) / torch.tensor(y.scale))
    return (rounded.clamp(-y.zero_point, 255 - y.zero_point) + y.zero_point).numpy().astype(np.uint8)


@pytest.mark.parametrize("seed", CASES)
def test_an_agreeing_scale_is_near_and_holds_in_onnx_runtime(seed, tmp_path):
    a, b, y = grids(seed)
    found = CodeGrid(agreeing_scale(a, b, y), y.zero_point)
    assert sums_agree(a, b, found)
    assert 1.0 <= found.scale / y.scale <= 1.0 + TRIES * APART
    assert np.array_equal(by_onnxruntime(a, b, found, tmp_path), as_frozen(a, b, found))


def test_some_scales_do_not_agree_and_are_moved():
    kept = [sums_agree(*grids(seed)) for seed in CASES]
    assert 0 < sum(kept) < len(kept)
    moved = [agreeing_scale(a, b, y) != y.scale for a, b, y in map(grids, CASES)]
    assert moved == [not agrees for agrees in kept]


@pytest.mark.parametrize(("zero_point", "agrees"), [(76, True), (77, False)])
def test_exact_ties_agree_where_the_zero_point_is_even(zero_point, agrees):
    """The kernel rounds behind the zero point: half to even is another way up where that is odd."""
    a, b, y = CodeGrid(0.5, 3), CodeGrid(0.125, 200), CodeGrid(0.25, zero_point)
    assert sums_agree(a, b, y) is agrees
    assert sums_agree(a, b, CodeGrid(agreeing_scale(a, b, y), zero_point))
