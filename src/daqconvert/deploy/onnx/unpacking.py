"""Weight codes in an ONNX file: packed bit planes and the standard operators that unpack them.

Convention: `N` codes of `b` bits are one uint8 initializer of shape `(b, 1, ceil(N / 8))` whose bytes are exactly
those of `functional.packing.pack`: plane 0 holds the least significant bits, element `i` is bit `i % 8` of byte
`i // 8`. With `n = 2**b - 1` and `m = 2**(b - 1) - 1` the nodes compute

    bits    = (planes & 2**[0..7]) != 0        (b, 8, bytes)   BitwiseAnd, Cast
    codes   = OR over p of 2**p where bits[p]  (1, 8, bytes)   Where, Split, BitwiseOr
    operand = 2 * codes - n, codes - m, ...       Transpose, Cast, Mul, Sub, Reshape, Slice

ONNX Runtime computes all of it once, at load. Everything before the last cast is one byte an element: that keeps
loading fast and the memory for it at `b` bytes per weight. `BitShift` would do as well, but OpenVINO folds a shift to
the right into a division that does not always round down.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from daqconvert.functional.grid import coding
from daqconvert.functional.packing import pack

if TYPE_CHECKING:
    from onnx import NodeProto, TensorProto


class Parts:
    """New nodes and initializers of a graph; a constant that is asked for twice is stored once."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.initializers: dict[str, TensorProto] = {}

    def node(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        """Add a node with one output; return the output's name."""
        from onnx import helper

        self.nodes.append(helper.make_node(op, inputs, [output], **attributes))
        return output

    def constant(self, name: str, value: np.ndarray | np.generic) -> str:
        """Add an initializer unless there is one of that name; return the name."""
        from onnx import numpy_helper

        if name not in self.initializers:
            array = np.ascontiguousarray(value).reshape(np.shape(value))  # which makes a scalar a vector
            self.initializers[name] = numpy_helper.from_array(array, name)
        return name


def add_weight(parts: Parts, name: str, codes: np.ndarray, bits: int, grid: str, output: str) -> None:
    """Add the packed codes of one weight and the nodes that unpack them.

    Args:
        parts: Where they go.
        name: Of the initializer, as `layer1.0.conv1.weight_codes`; the prefix of the nodes' outputs.
        codes: uint8, shape of the weight.
        bits: 1 to 8.
        grid: `"midrise"`, `"integer"` or `"twos"`.
        output: Name of the integer-valued float operand.
    """
    count, size = codes.size, -(-codes.size // 8)
    planes = pack(torch.tensor(codes), bits).numpy().reshape(bits, 1, size)
    parts.constant(name, planes)
    masks = parts.constant("daq.masks", (1 << np.arange(8)).astype(np.uint8).reshape(8, 1))
    x = parts.node("BitwiseAnd", [name, masks], f"{name}.masked")
    x = parts.node("Cast", [x], f"{name}.bits", to=9)  # TensorProto.BOOL
    if bits > 1:
        places = parts.constant(f"daq.places{bits}", (1 << np.arange(bits)).astype(np.uint8).reshape(bits, 1, 1))
        x = parts.node("Where", [x, places, parts.constant("daq.none", np.uint8(0))], f"{name}.placed")
        x = _join_planes(parts, name, x, bits)
    x = parts.node("Transpose", [x], f"{name}.ordered", perm=[0, 2, 1])
    x = parts.node("Cast", [x], f"{name}.cast", to=1)  # TensorProto.FLOAT
    if grid == "midrise":
        x = parts.node("Mul", [x, parts.constant("daq.two", np.float32(2))], f"{name}.doubled")
    down = -int(coding(bits, grid)[1])
    x = parts.node("Sub", [x, parts.constant(f"daq.top{down}", np.float32(down))], f"{name}.centred")
    if count % 8:
        flat = parts.constant("daq.flat", np.array([-1], dtype=np.int64))
        x = parts.node("Reshape", [x, flat], f"{name}.flat")
        start = parts.constant("daq.start", np.array([0], dtype=np.int64))
        x = parts.node("Slice", [x, start, _numbers(parts, [count])], f"{name}.cut")
    parts.node("Reshape", [x, _numbers(parts, codes.shape)], output)


def _join_planes(parts: Parts, name: str, x: str, bits: int) -> str:
    """Return the codes: the planes, each moved to its place already, joined by OR."""
    from onnx import helper

    planes = [f"{name}.plane{bit}" for bit in range(bits)]
    parts.nodes.append(helper.make_node("Split", [x], planes, axis=0, num_outputs=bits))
    joined = planes[0]
    for bit in range(1, bits):
        joined = parts.node("BitwiseOr", [joined, planes[bit]], f"{name}.joined{bit}")
    return joined


def _numbers(parts: Parts, values: Any) -> str:
    """Return an int64 constant, shared by all weights that need the same numbers."""
    numbers = np.array(values, dtype=np.int64)
    return parts.constant(f"daq.{'x'.join(map(str, numbers.tolist()))}", numbers)
