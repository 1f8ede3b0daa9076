"""Which tensors of a graph are codes: they are written as uint8, and as float only for nodes that compute in float.

A *code tensor* is a uint8 tensor of the file, with a scale and a zero point. It stands for a float tensor of the graph
and is found by the name of that float tensor. Nodes that only move elements (a max pool, a reshape, a pad with
zero) are given the codes; a clip that changes none of the codes is left out; every other node is given the values
that a `DequantizeLinear` computes. An operand (an integer-valued float tensor of the frozen model) is a code tensor as
well: its scale is 1, and it is written as `Cast` and `Sub`.

A `DequantizeLinear` before a node, and a `QuantizeLinear` behind it, is leave for a runtime to compute the node with
integers. Where this would give other codes (`FUSED`, `FUSED_TOGETHER`, and two grids in a row), the dequantized values
pass through a `Sum` of one term first. It changes no value, and no runtime looks through it for integers.

ONNX Runtime has an integer kernel for `Add`. A sum of two code tensors that is rounded to the grid of a third is
written as `Add` if this kernel computes the same codes on every processor (`functional.integer.sums_agree`). Otherwise
it is written as `Sum`, which runtimes compute in float32 from the dequantized values, as the frozen model does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from daqconvert.deploy.onnx.unpacking import GraphWriter
from daqconvert.functional.integer import CodeGrid, code_of, sums_agree

if TYPE_CHECKING:
    from onnx import NodeProto

MOVING = {"MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Identity", "Slice", "Concat", "Pad"}

FUSED = {"Softmax", "AveragePool", "GlobalAveragePool", "Resize", "Conv", "ConvTranspose", "Gemm"}
"""Nodes that ONNX Runtime computes with integers if their first input is dequantized: the float weight of a product is
quantized for that. Concat, LeakyRelu, Sigmoid and Where are no such case: it looks their codes up, which is exact.

References: ONNX Runtime, `onnxruntime/core/optimizer/qdq_transformer`, `QDQSelectorActionTransformer` and
`WeightBiasQuantization`.
"""
FUSED_TOGETHER = {"MatMul", "Mul"}
"""Nodes that ONNX Runtime computes with integers if all their inputs are dequantized."""


@dataclass(frozen=True)
class CodeTensor:
    """A tensor of codes: real values are `(code - zero_point) * scale`.

    Attributes:
        codes: Name of the uint8 tensor.
        scale_name: Name of the float32 scalar; empty for an operand, which has none.
        zero_point_name: Name of the uint8 scalar.
        scale: Real units per code; for an operand, those of the input that it was rounded from.
        zero_point: The code of zero.
        low: Smallest code.
        high: Largest code.
    """

    codes: str
    scale_name: str
    zero_point_name: str
    scale: float
    zero_point: int
    low: int
    high: int

    @property
    def is_operand(self) -> bool:
        """Whether it stands for integers, not for real values."""
        return not self.scale_name

    def as_operand(self) -> CodeTensor:
        """Return the operand of these codes: the integers `code - zero_point`."""
        return dataclasses.replace(self, scale_name="")

    def moved(self, codes: str) -> CodeTensor:
        """Return the code tensor after a node has moved its elements; `codes` is the name of the moved codes."""
        return dataclasses.replace(self, codes=codes)

    def same(self, other: CodeTensor) -> bool:
        """Return whether a code means the same value in both tensors."""
        return (self.scale, self.zero_point, self.is_operand) == (other.scale, other.zero_point, other.is_operand)


class CodeTensors:
    """The code tensors of a graph that is being written.

    Attributes:
        known: Name of a float tensor of the graph -> the code tensor that stands for it.

    Args:
        writer: Takes the nodes.
        constants: Values of initializers and constants by name.
        outputs: Names of the graph's outputs, which are float.
        rounded_to: Returns the grid that a float tensor of this name is rounded to, None if anything else reads it.
    """

    def __init__(
        self, writer: GraphWriter, constants: dict[str, np.ndarray], outputs: set[str],
        rounded_to: Callable[[str], CodeGrid | None],
    ) -> None:  # fmt: skip
        self.writer, self.constants, self.outputs = writer, constants, outputs
        self.rounded_to = rounded_to
        self.known: dict[str, CodeTensor] = {}

    def value(self, name: str) -> str:
        """Return the name of a float tensor with the values of `name`; write the nodes that compute it from codes."""
        tensor = self.known.get(name)
        if tensor is None:
            return name
        return self._operand(tensor) if tensor.is_operand else self.real(tensor, tensor.scale_name)

    def real(self, tensor: CodeTensor, scale_name: str) -> str:
        """Write `(codes - zero_point) * scale`, with the scale of that name, and return the result's name."""
        inputs = [tensor.codes, scale_name, tensor.zero_point_name]
        return self.writer.once("DequantizeLinear", inputs, f"{tensor.codes}.value")

    def float_value(self, name: str) -> str:
        """Return the name that `value` gives, for a reader that has to stay in float."""
        tensor, value = self.known.get(name), self.value(name)
        return value if tensor is None or tensor.is_operand else self.writer.once("Sum", [value], f"{value}.float")

    def _operand(self, tensor: CodeTensor) -> str:
        # NOTE: no DequantizeLinear: ONNX Runtime would then round the weights and bias of the same node again
        operand = self.writer.once("Cast", [tensor.codes], f"{tensor.codes}.operand", to=1)  # TensorProto.FLOAT
        if not tensor.zero_point:
            return operand
        zero = self.writer.constant(f"daq.zero{tensor.zero_point}", np.float32(tensor.zero_point))
        return self.writer.once("Sub", [operand, zero], f"{operand}.centred")

    def write(self, node: NodeProto) -> bool:
        """Write a node that is no placeholder, if it reads a code tensor; return whether it does."""
        tensors = [self.known.get(name) for name in node.input]
        if not any(tensors):
            return False
        first = tensors[0]
        free = not self.outputs & set(node.output)
        if free and first is not None and self._clips_nothing(node, first):
            self.known[node.output[0]] = first
        elif free and first is not None and self._moves(node, tensors):
            self._move(node, first)
        else:
            if node.op_type == "Add" and not all(tensor is None or tensor.is_operand for tensor in tensors):
                node.op_type = "Add" if self._agree(node, tensors) else "Sum"
            stays_float = node.op_type in FUSED or (node.op_type in FUSED_TOGETHER and all(tensors))
            for i, name in enumerate(node.input):
                node.input[i] = self.float_value(name) if stays_float else self.value(name)
            self.writer.nodes.append(node)
        return True

    def _agree(self, node: NodeProto, tensors: list[CodeTensor | None]) -> bool:
        """Return whether ONNX Runtime's integer kernel computes a sum to the same codes."""
        y = self.rounded_to(node.output[0])
        a, b = (None if t is None or t.is_operand else CodeGrid(t.scale, t.zero_point) for t in tensors)
        return y is not None and a is not None and b is not None and sums_agree(a, b, y)

    def _clips_nothing(self, node: NodeProto, tensor: CodeTensor) -> bool:
        """Return whether a Relu or Clip lets all codes of a tensor through unchanged."""
        if tensor.is_operand or node.op_type not in ("Relu", "Clip"):
            return False
        bounds: list[float | None] = [0.0, None]
        if node.op_type == "Clip":
            given = [*node.input[1:], "", ""][:2]
            if any(name and name not in self.constants for name in given):
                return False
            bounds = [float(self.constants[name]) if name else None for name in given]
        low, high = (None if b is None else code_of(b, tensor.scale, tensor.zero_point) for b in bounds)
        return (low is None or low <= tensor.low) and (high is None or tensor.high <= high)

    def _moves(self, node: NodeProto, tensors: list[CodeTensor | None]) -> bool:
        """Return whether a node only moves elements, or pads with zeros, so that it may be given codes."""
        if node.op_type not in MOVING or len(node.output) > 1:
            return False
        first = tensors[0]
        assert first is not None
        if node.op_type == "Concat":
            return all(tensor is not None and tensor.same(first) for tensor in tensors)
        if any(tensors[1:]):
            return False
        if node.op_type == "Pad":
            value = node.input[2] if len(node.input) > 2 else ""
            zero = not value or (value in self.constants and not np.any(self.constants[value]))
            return zero or not _pads_with_a_constant(node)
        return True

    def _move(self, node: NodeProto, tensor: CodeTensor) -> None:
        """Write a node that moves elements, with codes as its input; a pad then pads with the zero point."""
        output = node.output[0]
        for i, name in enumerate(node.input):
            known = self.known.get(name)
            node.input[i] = name if known is None else known.codes
        if node.op_type == "Pad" and _pads_with_a_constant(node):
            inputs = [*node.input, "", ""][:4]
            inputs[2] = tensor.zero_point_name
            while not inputs[-1]:
                inputs.pop()
            del node.input[:]
            node.input.extend(inputs)
        node.output[0] = f"{output}.codes"
        self.writer.nodes.append(node)
        self.known[output] = tensor.moved(node.output[0])


def _pads_with_a_constant(node: NodeProto) -> bool:
    return not any(a.name == "mode" and a.s != b"constant" for a in node.attribute)


def attributes(node: NodeProto) -> dict[str, Any]:
    """Return the integers and texts among a node's attributes."""
    return {a.name: a.i if a.type == 2 else a.s.decode() for a in node.attribute if a.type in (2, 3)}
