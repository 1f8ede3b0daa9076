"""Which tensors of a graph are codes: written as uint8, turned into float only for whoever computes in float.

A *grid tensor* is known by its float name, and is there as a uint8 tensor of codes with a scale and a zero point. What
only moves elements - a max pool, a reshape, a pad with zero - moves the codes; a clip that the codes satisfy already
is left out; everything else gets a `DequantizeLinear`. An operand (an integer-valued float of the frozen model) is a
grid tensor as well: of scale 1, written as `Cast` and `Sub`.

A sum of two grid tensors that is rounded to a third is written as `Add`, for which ONNX Runtime has an integer kernel,
where that computes the same codes on every processor (`functional.sums`). Else it is written as `Sum`, which runtimes
compute in float32, product by product, as the frozen model does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from daqconvert.deploy.onnx.unpacking import Parts
from daqconvert.functional.integer import CodeGrid, sums_agree

if TYPE_CHECKING:
    from onnx import NodeProto

MOVING = {"MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Identity", "Slice", "Concat", "Pad"}


@dataclass(frozen=True)
class Grid:
    """A tensor of codes.

    Attributes:
        codes: Name of the uint8 tensor.
        scale: Name of the float32 scalar; empty for an operand, whose scale is 1.
        zero_point: Name of the uint8 scalar.
        step: Value of the scale.
        zero: Value of the zero point.
        low: Smallest code.
        high: Largest code.
    """

    codes: str
    scale: str
    zero_point: str
    step: float
    zero: int
    low: int
    high: int

    def moved(self, codes: str) -> Grid:
        """Return the grid of the same values in other places."""
        return Grid(codes, self.scale, self.zero_point, self.step, self.zero, self.low, self.high)

    def same(self, other: Grid) -> bool:
        """Whether codes mean the same in both."""
        return (self.step, self.zero, self.scale == "") == (other.step, other.zero, other.scale == "")


class Grids:
    """The grid tensors of a graph that is being written."""

    def __init__(
        self, parts: Parts, constants: dict[str, np.ndarray], outputs: set[str],
        rounded_to: Callable[[str], CodeGrid | None],
    ) -> None:  # fmt: skip
        """Begin.

        Args:
            parts: Where nodes go.
            constants: Values of initializers and constants by name.
            outputs: Names of the graph's outputs, which are float.
            rounded_to: Says to which grid a float tensor goes at once and alone, if any.
        """
        self.parts, self.constants, self.outputs = parts, constants, outputs
        self.rounded_to = rounded_to
        self.known: dict[str, Grid] = {}
        self.written: set[str] = set()

    def value(self, name: str) -> str:
        """Return the name of a float tensor with the values of `name`, writing the nodes for a grid tensor."""
        grid = self.known.get(name)
        if grid is None:
            return name
        return self.real(grid.codes, grid.scale, grid.zero_point) if grid.scale else self._operand(grid)

    def real(self, codes: str, scale: str, zero_point: str) -> str:
        """Return the name of `(codes - zero_point) * scale`."""
        return self.once("DequantizeLinear", [codes, scale, zero_point], f"{codes}.value")

    def _operand(self, grid: Grid) -> str:
        # NOTE: no DequantizeLinear: ONNX Runtime takes it as leave to round the weights and bias beside it anew
        operand = self.once("Cast", [grid.codes], f"{grid.codes}.operand", to=1)  # TensorProto.FLOAT
        if not grid.zero:
            return operand
        zero = self.parts.constant(f"daq.zero{grid.zero}", np.float32(grid.zero))
        return self.once("Sub", [operand, zero], f"{operand}.centred")

    def once(self, op: str, inputs: list[str], output: str, **given: Any) -> str:
        """Write a node with one output unless that is there already; return the output's name."""
        if output not in self.written:
            self.written.add(output)
            self.parts.node(op, inputs, output, **given)
        return output

    def write(self, node: NodeProto) -> bool:
        """Write an ordinary node that reads a grid tensor; return whether it reads one.

        Args:
            node: Any; its inputs may be changed.
        """
        grids = [self.known.get(name) for name in node.input]
        if not any(grids):
            return False
        first = grids[0]
        free = not self.outputs & set(node.output)
        if free and first is not None and self._clips_nothing(node, first):
            self.known[node.output[0]] = first
        elif free and first is not None and self._moves(node, grids):
            self._move(node, first)
        else:
            if node.op_type == "Add" and any(grid is not None and grid.scale for grid in grids):
                node.op_type = "Add" if self._agree(node, grids) else "Sum"
            for i, name in enumerate(node.input):
                node.input[i] = self.value(name)
            self.parts.nodes.append(node)
        return True

    def _agree(self, node: NodeProto, grids: list[Grid | None]) -> bool:
        """Whether ONNX Runtime's integer kernel computes a sum to the same codes."""
        y = self.rounded_to(node.output[0])
        a, b = ((CodeGrid(g.step, g.zero) if g is not None and g.scale else None) for g in grids)
        return y is not None and a is not None and b is not None and sums_agree(a, b, y)

    def _clips_nothing(self, node: NodeProto, grid: Grid) -> bool:
        """Whether all codes of a grid are inside what a Relu or Clip lets through."""
        if not grid.scale or node.op_type not in ("Relu", "Clip"):
            return False
        bounds: list[float | None] = [0.0, None]
        if node.op_type == "Clip":
            given = [*node.input[1:], "", ""][:2]
            if any(name and name not in self.constants for name in given):
                return False
            bounds = [float(self.constants[name]) if name else None for name in given]
        codes = [None if bound is None else round(bound / grid.step) + grid.zero for bound in bounds]
        return (codes[0] is None or codes[0] <= grid.low) and (codes[1] is None or grid.high <= codes[1])

    def _moves(self, node: NodeProto, grids: list[Grid | None]) -> bool:
        if node.op_type not in MOVING or len(node.output) > 1:
            return False
        first = grids[0]
        assert first is not None
        if node.op_type == "Concat":
            return all(grid is not None and grid.same(first) for grid in grids)
        if any(grids[1:]):
            return False
        if node.op_type == "Pad":
            value = node.input[2] if len(node.input) > 2 else ""
            zero = not value or (value in self.constants and not np.any(self.constants[value]))
            return zero or any(a.name == "mode" and a.s != b"constant" for a in node.attribute)
        return True

    def _move(self, node: NodeProto, grid: Grid) -> None:
        output = node.output[0]
        for i, name in enumerate(node.input):
            known = self.known.get(name)
            node.input[i] = name if known is None else known.codes
        if node.op_type == "Pad" and not any(a.name == "mode" and a.s != b"constant" for a in node.attribute):
            inputs = [*node.input, "", ""][:4]
            inputs[2] = grid.zero_point
            while not inputs[-1]:
                inputs.pop()
            del node.input[:]
            node.input.extend(inputs)
        node.output[0] = f"{output}.codes"
        self.parts.nodes.append(node)
        self.known[output] = grid.moved(node.output[0])


def attributes(node: NodeProto) -> dict[str, Any]:
    """Return the integers and texts among a node's attributes."""
    return {a.name: a.i if a.type == 2 else a.s.decode() for a in node.attribute if a.type in (2, 3)}
