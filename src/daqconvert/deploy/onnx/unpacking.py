"""Weight codes in an ONNX file: packed bit planes, and the standard operators that unpack them.

Convention: `N` codes of `b` bits are one uint8 initializer of shape `(b, 1, ceil(N / 8))` whose bytes are exactly
those of `functional.packing.pack`: plane 0 holds the least significant bits, element `i` is bit `i % 8` of byte
`i // 8`. The operand of a code is `step * code + lowest` (`functional.grid.coding`). The nodes compute

    bits    = (planes & 2**[0..7]) != 0        (b, 8, bytes)   BitwiseAnd, Cast
    codes   = OR over p of 2**p where bits[p]  (1, 8, bytes)   Where, Split, BitwiseOr
    operand = step * codes + lowest            the weight's    Transpose, Cast, Mul, Sub, Reshape, Slice

ONNX Runtime computes all of this once, when it loads the file. Tensors before the last cast have one byte per
element, so that loading is fast and takes `b` bytes of memory per weight. `BitShift` would do as well, but OpenVINO
folds a shift to the right into a division that does not always round down.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from daqconvert.functional.grid import coding
from daqconvert.functional.packing import pack

if TYPE_CHECKING:
    from onnx import NodeProto, TensorProto


class GraphWriter:
    """New nodes and initializers of a graph; a constant that is asked for twice is stored once.

    Attributes:
        nodes: In the order of execution.
        initializers: By name.
    """

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.initializers: dict[str, TensorProto] = {}
        self._begun: set[str] = set()

    def node(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        """Add a node with one output; return the output's name."""
        from onnx import helper

        self.nodes.append(helper.make_node(op, inputs, [output], **attributes))
        return output

    def begin(self, name: str) -> bool:
        """Return whether this name is given for the first time, and remember it."""
        new = name not in self._begun
        self._begun.add(name)
        return new

    def once(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        """Add a node with one output unless its name has been given before; return the output's name."""
        if self.begin(output):
            self.node(op, inputs, output, **attributes)
        return output

    def constant(self, name: str, value: np.ndarray | np.generic) -> str:
        """Add an initializer unless there is one of that name; return the name."""
        from onnx import numpy_helper

        if name not in self.initializers:
            array = np.ascontiguousarray(value).reshape(np.shape(value))  # ascontiguousarray makes a scalar a vector
            self.initializers[name] = numpy_helper.from_array(array, name)
        return name


def add_weight(writer: GraphWriter, name: str, codes: np.ndarray, bits: int, grid: str, output: str) -> None:
    """Write the packed codes of one weight, and the nodes that make its integer-valued float operand `output`.

    The initializer is called `name`, such as `layer1.0.conv1.weight_codes`; the names of the tensors on the way to
    `output` begin with it.
    """
    count, size = codes.size, -(-codes.size // 8)
    planes = pack(torch.tensor(codes), bits).numpy().reshape(bits, 1, size)
    writer.constant(name, planes)
    masks = writer.constant("daq.masks", (1 << np.arange(8)).astype(np.uint8).reshape(8, 1))
    x = writer.node("BitwiseAnd", [name, masks], f"{name}.masked")
    x = writer.node("Cast", [x], f"{name}.bits", to=9)  # TensorProto.BOOL
    if bits > 1:
        places = writer.constant(f"daq.places{bits}", (1 << np.arange(bits)).astype(np.uint8).reshape(bits, 1, 1))
        x = writer.node("Where", [x, places, writer.constant("daq.none", np.uint8(0))], f"{name}.placed")
        x = _join_planes(writer, name, x, bits)
    x = writer.node("Transpose", [x], f"{name}.ordered", perm=[0, 2, 1])
    x = writer.node("Cast", [x], f"{name}.cast", to=1)  # TensorProto.FLOAT
    step, lowest = coding(bits, grid)
    if step != 1.0:
        x = writer.node("Mul", [x, writer.constant("daq.two", np.float32(step))], f"{name}.doubled")
    down = -int(lowest)
    x = writer.node("Sub", [x, writer.constant(f"daq.top{down}", np.float32(down))], f"{name}.centred")
    if count % 8:
        flat = writer.constant("daq.flat", np.array([-1], dtype=np.int64))
        x = writer.node("Reshape", [x, flat], f"{name}.flat")
        start = writer.constant("daq.start", np.array([0], dtype=np.int64))
        x = writer.node("Slice", [x, start, _numbers(writer, [count])], f"{name}.cut")
    writer.node("Reshape", [x, _numbers(writer, codes.shape)], output)


def _join_planes(writer: GraphWriter, name: str, x: str, bits: int) -> str:
    """Write the codes, which are the planes joined by OR (their bits are in place already), and return their name."""
    from onnx import helper

    planes = [f"{name}.plane{bit}" for bit in range(bits)]
    writer.nodes.append(helper.make_node("Split", [x], planes, axis=0, num_outputs=bits))
    joined = planes[0]
    for bit in range(1, bits):
        joined = writer.node("BitwiseOr", [joined, planes[bit]], f"{name}.joined{bit}")
    return joined


def _numbers(writer: GraphWriter, values: Any) -> str:
    """Return an int64 constant, which all weights that need the same numbers share."""
    numbers = np.array(values, dtype=np.int64)
    return writer.constant(f"daq.{'x'.join(map(str, numbers.tolist()))}", numbers)
