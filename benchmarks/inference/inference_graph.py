"""Which convolutions and linears of an ONNX file run as integer kernels: counted in ONNX Runtime's optimized graph."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

INTEGER = {  # operator: positions of its two operands among its inputs
    "QLinearConv": (0, 3),
    "QLinearMatMul": (0, 3),
    "QGemm": (0, 3),
    "QAttention": (0, 1),
    "ConvInteger": (0, 1),
    "MatMulInteger": (0, 1),
    "MatMulIntegerToFloat": (0, 1),
    "DynamicQuantizeMatMul": (0, 1),
}
FLOAT = {
    "Conv": (0, 1),
    "FusedConv": (0, 1),
    "NhwcFusedConv": (0, 1),
    "ConvTranspose": (0, 1),
    "Gemm": (0, 1),
    "FusedGemm": (0, 1),
    "MatMul": (0, 1),
    "FusedMatMul": (0, 1),
    "MatMulNBits": (0, 1),
    "Attention": (0, 1),
    "Einsum": (0, 1),
}


def optimized(path: Path, threads: int) -> Any:
    """Return the graph into which ONNX Runtime optimizes a file when it loads it, as a `ModelProto`."""
    import onnx
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        options.intra_op_num_threads = threads
        options.log_severity_level = 3  # hides the warning that such a file is for this machine alone
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return onnx.load(options.optimized_model_filepath)


def count(path: Path, threads: int) -> dict[str, Any]:
    """Return how many layers run as integer kernels, and the names of the others; products of two activations apart.

    Args:
        path: The file.
        threads: Threads of the session; the optimizations do not depend on them, as far as is known.
    """
    graph = optimized(path, threads).graph
    constant = set(_constants(graph))
    found: dict[str, Any] = {"integer": 0, "float": [], "products_integer": 0, "products_float": 0, "operators": {}}
    for node in graph.node:
        found["operators"][node.op_type] = found["operators"].get(node.op_type, 0) + 1
        whole = node.op_type in INTEGER
        places = INTEGER.get(node.op_type) or FLOAT.get(node.op_type)
        if places is None:
            continue
        weights = [node.input[place] for place in places if place < len(node.input) and node.input[place] in constant]
        if not weights:
            found["products_integer" if whole else "products_float"] += 1
        elif whole:
            found["integer"] += 1
        else:
            found["float"].append(f"{node.op_type} of {weights[0]}")  # the layer's name outlives optimization there
    return found


def _constants(graph: Any) -> Iterator[str]:
    """Return the names of initializers and of what is computed from them alone, such as a dequantized int8 weight."""
    known = {tensor.name for tensor in graph.initializer} | {tensor.values.name for tensor in graph.sparse_initializer}
    for node in graph.node:  # in topological order
        if all(name in known for name in node.input if name):
            known.update(node.output)
    yield from known
