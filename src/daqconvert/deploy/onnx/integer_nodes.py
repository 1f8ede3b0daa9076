"""Products of codes, written so that a runtime computes them with integers.

    convolution, integer deployment   Dequantize(codes), Dequantize(weight), Dequantize(bias) -> Conv -> QuantizeLinear
    linear, integer deployment        MatMulInteger(codes, weight) -> Add(bias) -> Cast -> Mul(m) -> QuantizeLinear
    linear, float output              Dequantize(codes), Dequantize(weight) -> MatMul

ONNX Runtime makes a `QLinearConv` of the first and a `MatMulIntegerToFloat` of the last. Weights are unpacked from bit
planes into int8 by standard operators, once, at load.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from daqconvert.deploy.onnx.code_tensors import Grid, Grids
from daqconvert.deploy.onnx.unpacking import Parts, add_weight
from daqconvert.functional.grid import levels
from daqconvert.functional.integer import LARGEST_WEIGHT

if TYPE_CHECKING:
    from onnx import NodeProto

PRODUCTS = ("MatMul", "Gemm")
FLOAT, INT8 = 1, 3  # of TensorProto


@dataclass(frozen=True)
class Weight:
    """A weight operand that is not unpacked yet.

    Attributes:
        layer: Name of its layer.
        codes: uint8, shape of the weight.
        bits: Of the codes.
        grid: `"midrise"`, `"integer"` or `"twos"`.
        transposed: Whether its two dimensions are exchanged.
    """

    layer: str
    codes: np.ndarray
    bits: int
    grid: str
    transposed: bool = False

    def named(self, key: str) -> str:
        """Return the name of a tensor of its layer."""
        return f"{self.layer}.{key}" if self.layer else key


class Kernels:
    """Writes products of a grid tensor and a weight.

    Attributes:
        weights: Name of a tensor of the graph -> the weight that it stands for.
        scales: Name of an operand -> name of the scale that takes it to real units.
        scaled: Name of a sum -> name of the tensor that holds it in real units already.
    """

    def __init__(self, parts: Parts, grids: Grids, values: dict[str, np.ndarray]) -> None:
        self.parts, self.grids, self.values = parts, grids, values
        self.weights: dict[str, Weight] = {}
        self.scales: dict[str, str] = {}
        self.scaled: dict[str, str] = {}
        self.sums: dict[str, str] = {}

    def move(self, node: NodeProto) -> bool:
        """Take note of a transposed weight, or of an operand that a pad goes to; return whether that was all."""
        weight = self.weights.get(node.input[0]) if node.input else None
        if weight is not None and node.op_type == "Transpose" and weight.codes.ndim == 2:
            self.weights[node.output[0]] = Weight(
                weight.layer, weight.codes, weight.bits, weight.grid, not weight.transposed
            )
            return True
        if node.op_type == "Pad" and node.input[0] in self.scales:
            scale, output = self.scales[node.input[0]], node.output[0]
            if self.grids.write(node) and output in self.grids.known:
                self.scales[output] = scale
            return True
        return False

    def float_weight(self, name: str) -> None:
        """Write a weight as an integer-valued float tensor of that name, for whoever multiplies in float."""
        weight = self.weights.pop(name, None)
        if weight is None:
            return
        key = weight.named("weight")
        if key not in self.grids.written:
            add_weight(self.parts, weight.named("weight_codes"), weight.codes, weight.bits, weight.grid, key)
            self.grids.written.add(key)
        if weight.transposed:
            self.parts.node("Transpose", [key], name, perm=[1, 0])
        else:
            self.parts.node("Identity", [key], name)

    def write(self, node: NodeProto, ending: NodeProto, given: dict[str, Any]) -> bool:
        """Write a product whose sum an `ending` takes to real units or codes; return whether it can be done here.

        Args:
            node: The product.
            ending: `Requantize` or `Rescale`.
            given: Its attributes.
        """
        if len(node.input) < 2 or node.input[0] not in self.scales or node.input[1] not in self.weights:
            return False
        x, weight = self.grids.known.get(node.input[0]), self.weights[node.input[1]]
        if x is None:
            return False
        if ending.op_type == "Requantize":
            if node.op_type == "Conv":
                self._convolution(node, x, weight, ending)
            else:
                self._linear(node, x, weight, ending)
            return True
        if node.op_type in PRODUCTS and levels(weight.bits, weight.grid) <= LARGEST_WEIGHT:
            return self._float_linear(node, x, weight, ending)
        return False

    def quantize(self, ending: NodeProto, grid: Grid) -> None:
        """Write the codes of an output.

        Args:
            ending: `Requantize`.
            grid: Of the output; its codes are what is written.
        """
        product = self.sums[ending.input[0]]
        scale = grid.scale
        if product.endswith(".units"):  # counts in units of the output already
            scale = self.parts.constant("daq.unit", np.float32(1.0))
        clipped = (grid.low, grid.high) != (0, 255)
        first = f"{grid.codes}.unclipped" if clipped else grid.codes
        self.parts.node("QuantizeLinear", [product, scale, grid.zero_point], first)
        if clipped:
            low = self.parts.constant(f"daq.code{grid.low}", np.uint8(grid.low)) if grid.low else ""
            high = self.parts.constant(f"daq.code{grid.high}", np.uint8(grid.high)) if grid.high < 255 else ""
            self.parts.node("Clip", [first, low, high] if high else [first, low], grid.codes)

    def _convolution(self, node: NodeProto, x: Grid, weight: Weight, ending: NodeProto) -> None:
        x_scale, w_scale, factor, bias = (self.values[name] for name in ending.input[1:5])
        integers = self._int8(weight, factor)
        scale = self.parts.constant(weight.named("weight_scale"), w_scale)
        unit = self.parts.constant(weight.named("bias_scale"), np.float32(x_scale) * w_scale)
        codes = self.parts.constant(weight.named("bias"), bias)
        operand = self._real(x, node.input[0])
        node.input[0] = operand
        node.input[1] = self.grids.once("DequantizeLinear", [integers, scale], weight.named("weight"), axis=0)
        del node.input[2:]
        node.input.append(self.grids.once("DequantizeLinear", [codes, unit], weight.named("bias.value"), axis=0))
        self.sums[ending.input[0]] = node.output[0]
        self.parts.nodes.append(node)

    def _linear(self, node: NodeProto, x: Grid, weight: Weight, ending: NodeProto) -> None:
        x_scale, w_scale, factor, bias, y_scale = (self.values[name] for name in ending.input[1:6])
        integers = self._turned(node, weight, self._int8(weight, factor))
        output = node.output[0]
        acc = self.parts.node("MatMulInteger", [x.codes, integers, x.zero_point], f"{output}.products")
        codes = self.parts.constant(weight.named("bias"), bias)
        acc = self.parts.node(
            "Cast", [self.parts.node("Add", [acc, codes], f"{output}.sum")], f"{output}.cast", to=FLOAT
        )
        m = self.parts.constant(weight.named("multiplier"), (np.float32(x_scale) * w_scale) / np.float32(y_scale))
        self.sums[ending.input[0]] = self.parts.node("Mul", [acc, m], f"{output}.units")

    def _float_linear(self, node: NodeProto, x: Grid, weight: Weight, ending: NodeProto) -> bool:
        integers = self._turned(node, weight, self._int8(weight, np.int8(1)))
        total, output = self.values[ending.input[1]], node.output[0]
        if node.op_type == "Gemm":  # of two dimensions: ONNX Runtime would join MatMul and Add to a Gemm in float
            acc = self.parts.node("MatMulInteger", [x.codes, integers, x.zero_point], f"{output}.products")
            acc = self.parts.node("Cast", [acc], f"{output}.cast", to=FLOAT)
            scale = self.parts.constant(weight.named("scale"), total)
            self.scaled[output] = self.parts.node("Mul", [acc, scale], f"{output}.scaled")
            return True
        steps = weight_scale(total, np.float32(self.values[self.scales[node.input[0]]]))
        step = self.parts.constant(weight.named("weight_scale"), steps)
        axis = {"axis": 1} if steps.ndim else {}
        real = self.grids.once("DequantizeLinear", [integers, step], f"{integers}.value", **axis)
        self.scaled[output] = self.parts.node("MatMul", [self._real(x, node.input[0]), real], f"{output}.scaled")
        return True

    def _turned(self, node: NodeProto, weight: Weight, integers: str) -> str:
        """The int8 weight with inputs first, as a product of matrices takes it."""
        exchanged = weight.transposed != any(a.name == "transB" and a.i for a in node.attribute)
        return self.grids.once("Transpose", [integers], f"{integers}.turned", perm=[1, 0]) if exchanged else integers

    def _real(self, x: Grid, operand: str) -> str:
        """The input in real units."""
        return self.grids.real(x.codes, self.scales[operand], x.zero_point)

    def _int8(self, weight: Weight, factor: np.ndarray | np.generic) -> str:
        """The unpacked weight times `factor`, as int8."""
        codes = weight.named("weight_codes")
        name = f"{codes}.int8"
        if name in self.grids.written:
            return name
        self.grids.written.add(name)
        operand = f"{codes}.integers"
        add_weight(self.parts, codes, weight.codes, weight.bits, weight.grid, operand)
        values = np.unique(factor)
        if values.size > 1:
            shaped = factor.astype(np.float32).reshape(-1, *(1,) * (weight.codes.ndim - 1))
            by = self.parts.constant(weight.named("weight_factor"), shaped)
            operand = self.parts.node("Mul", [operand, by], f"{codes}.multiplied")
        elif values.size and values[0] != 1:
            by = self.parts.constant(f"daq.factor{values[0]}", np.float32(values[0]))
            operand = self.parts.node("Mul", [operand, by], f"{codes}.multiplied")
        return self.parts.node("Cast", [operand], name, to=INT8)


def weight_scale(total: np.ndarray, x_scale: np.float32) -> np.ndarray:
    """Return float32 `w` for which `x_scale * w` is `total` in float32, or next to it where there is none.

    Args:
        total: float32: what a unit of the products is worth.
        x_scale: Step of the input.
    """
    best = (total.astype(np.float64) / np.float64(x_scale)).astype(np.float32)
    for direction in (-np.inf, np.inf):
        other = np.nextafter(best, np.float32(direction))
        better = (x_scale * best != total) & (x_scale * other == total)
        best = np.where(better, other, best)
    return np.asarray(best, dtype=np.float32)
