"""Products of codes, written so that a runtime computes them with integers.

    convolution, integer deployment   Dequantize(codes), Dequantize(weight), Dequantize(bias) -> Conv -> QuantizeLinear
    linear, integer deployment        MatMulInteger(codes, weight) -> Add(bias) -> Cast -> Mul(m) -> QuantizeLinear
    linear, float output              Dequantize(codes), Dequantize(weight) -> MatMul -> Add(bias), or Sum

ONNX Runtime turns the first row into a `QLinearConv` and the last into a `MatMulIntegerToFloat`. Weights are unpacked
from bit planes into int8 by standard operators, once, when the file is loaded.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from daqconvert.deploy.onnx.code_tensors import CodeTensor, CodeTensors
from daqconvert.deploy.onnx.unpacking import GraphWriter, add_weight
from daqconvert.functional.grid import levels
from daqconvert.functional.integer import LARGEST_WEIGHT, IntegerLayer

if TYPE_CHECKING:
    from onnx import NodeProto

PRODUCTS = ("MatMul", "Gemm")
FLOAT, INT8 = 1, 3  # of TensorProto


@dataclass(frozen=True)
class PackedWeight:
    """A weight operand that is not unpacked yet; the node that multiplies with it decides how it is unpacked.

    Attributes:
        layer: Name of its layer.
        codes: uint8, shape of the weight.
        bits: Bits of the codes.
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


class ProductWriter:
    """Writes products of a code tensor and a weight.

    Attributes:
        weights: Name of a tensor of the graph -> the weight that it stands for.
        input_scales: Name of an operand -> name of the scale that converts it to real units.
        in_real_units: Name of a product -> name of the tensor that holds it in real units already.
    """

    def __init__(self, writer: GraphWriter, tensors: CodeTensors, values: dict[str, np.ndarray]) -> None:
        self.writer, self.tensors, self.values = writer, tensors, values
        self.weights: dict[str, PackedWeight] = {}
        self.input_scales: dict[str, str] = {}
        self.in_real_units: dict[str, str] = {}
        self._sums: dict[str, str] = {}

    def move(self, node: NodeProto) -> bool:
        """Note a transposed weight, or write a pad of an operand; return whether this settles the node."""
        weight = self.weights.get(node.input[0]) if node.input else None
        if weight is not None and node.op_type == "Transpose" and weight.codes.ndim == 2:
            self.weights[node.output[0]] = dataclasses.replace(weight, transposed=not weight.transposed)
            return True
        if node.op_type == "Pad" and node.input[0] in self.input_scales:
            scale, output = self.input_scales[node.input[0]], node.output[0]
            if self.tensors.write(node) and output in self.tensors.known:
                self.input_scales[output] = scale
            return True
        return False

    def float_weight(self, name: str) -> None:
        """Write a weight as an integer-valued float tensor of that name, for a node that multiplies in float."""
        weight = self.weights.pop(name, None)
        if weight is None:
            return
        key = weight.named("weight")
        if self.writer.begin(key):
            add_weight(self.writer, weight.named("weight_codes"), weight.codes, weight.bits, weight.grid, key)
        if weight.transposed:
            self.writer.node("Transpose", [key], name, perm=[1, 0])
        else:
            self.writer.node("Identity", [key], name)

    def write(self, node: NodeProto, ending: NodeProto) -> bool:
        """Write a product; the node `ending` (`Requantize` or `Rescale`) converts its sum to codes or real units.

        Return False, and write nothing, if a runtime cannot compute the product with integers.
        """
        if len(node.input) < 2 or node.input[0] not in self.input_scales or node.input[1] not in self.weights:
            return False
        x, weight = self.tensors.known.get(node.input[0]), self.weights[node.input[1]]
        if x is None:
            return False
        if ending.op_type == "Requantize":
            if node.op_type == "Conv":
                self._convolution(node, x, weight, ending)
            else:
                self._linear(node, x, weight, ending)
            return True
        if node.op_type in PRODUCTS and levels(weight.bits, weight.grid) <= LARGEST_WEIGHT:
            self._float_linear(node, x, weight, ending)
            return True
        return False

    def quantize(self, ending: NodeProto, y: CodeTensor) -> None:
        """Write the codes `y` of the output of a product that ends in `Requantize`."""
        product = self._sums[ending.input[0]]
        scale = y.scale_name
        if product.endswith(".units"):  # the product is in units of the output's scale already
            scale = self.writer.constant("daq.unit", np.float32(1.0))
        clipped = (y.low, y.high) != (0, 255)
        first = f"{y.codes}.unclipped" if clipped else y.codes
        self.writer.node("QuantizeLinear", [product, scale, y.zero_point_name], first)
        if clipped:
            low = self.writer.constant(f"daq.code{y.low}", np.uint8(y.low)) if y.low else ""
            high = self.writer.constant(f"daq.code{y.high}", np.uint8(y.high)) if y.high < 255 else ""
            self.writer.node("Clip", [first, low, high] if high else [first, low], y.codes)

    def _numbers(self, ending: NodeProto) -> tuple[Tensor, IntegerLayer]:
        """Return the scale of the input and the numbers of an integer layer, from the inputs of its `Requantize`."""
        x_scale, *numbers = (torch.tensor(self.values[name]) for name in ending.input[1:8])
        return x_scale, IntegerLayer(*numbers)

    def _convolution(self, node: NodeProto, x: CodeTensor, weight: PackedWeight, ending: NodeProto) -> None:
        x_scale, numbers = self._numbers(ending)
        integers = self._int8(weight, numbers.factor.numpy())
        scale = self.writer.constant(weight.named("weight_scale"), numbers.weight_scale.numpy())
        bias_scale = self.writer.constant(weight.named("bias_scale"), numbers.sum_scale(x_scale).numpy())
        codes = self.writer.constant(weight.named("bias"), numbers.bias.numpy())
        operand = self._real(x, node.input[0])
        node.input[0] = operand
        node.input[1] = self.writer.once("DequantizeLinear", [integers, scale], weight.named("weight"), axis=0)
        del node.input[2:]
        real_bias = self.writer.once("DequantizeLinear", [codes, bias_scale], weight.named("bias.value"), axis=0)
        node.input.append(real_bias)
        self._sums[ending.input[0]] = node.output[0]
        self.writer.nodes.append(node)

    def _linear(self, node: NodeProto, x: CodeTensor, weight: PackedWeight, ending: NodeProto) -> None:
        x_scale, numbers = self._numbers(ending)
        acc = self._integer_product(node, x, weight, numbers.factor.numpy())
        codes, output = self.writer.constant(weight.named("bias"), numbers.bias.numpy()), node.output[0]
        acc = self.writer.node("Add", [acc, codes], f"{output}.sum")
        acc = self.writer.node("Cast", [acc], f"{output}.cast", to=FLOAT)
        m = self.writer.constant(weight.named("multiplier"), numbers.multiplier(x_scale).numpy())
        self._sums[ending.input[0]] = self.writer.node("Mul", [acc, m], f"{output}.units")

    def _float_linear(self, node: NodeProto, x: CodeTensor, weight: PackedWeight, ending: NodeProto) -> None:
        sum_scale, output = self.values[ending.input[1]], node.output[0]
        if node.op_type == "Gemm":  # two dimensions: ONNX Runtime would join a MatMul and its Add to a float Gemm
            acc = self._integer_product(node, x, weight, np.int8(1))
            acc = self.writer.node("Cast", [acc], f"{output}.cast", to=FLOAT)
            scale = self.writer.constant(weight.named("scale"), sum_scale)
            self.in_real_units[output] = self.writer.node("Mul", [acc, scale], f"{output}.scaled")
            return
        integers = self._inputs_first(node, weight, np.int8(1))
        scales = weight_scale(sum_scale, np.float32(self.values[self.input_scales[node.input[0]]]))
        name = self.writer.constant(weight.named("weight_scale"), scales)
        axis = {"axis": 1} if scales.ndim else {}
        real = self.writer.once("DequantizeLinear", [integers, name], f"{integers}.value", **axis)
        product = self.writer.node("MatMul", [self._real(x, node.input[0]), real], f"{output}.scaled")
        if len(ending.input) < 3 or not ending.input[2]:
            # NOTE: of a MatMul right before a QuantizeLinear, ONNX Runtime rounds the sums in a way of its own
            product = self.writer.node("Sum", [product], f"{output}.float")
        self.in_real_units[output] = product

    def _integer_product(
        self, node: NodeProto, x: CodeTensor, weight: PackedWeight, factor: np.ndarray | np.generic
    ) -> str:
        """Write the int32 sums of products of codes and int8 weight, and return their name."""
        integers = self._inputs_first(node, weight, factor)
        inputs = [x.codes, integers, x.zero_point_name]
        return self.writer.node("MatMulInteger", inputs, f"{node.output[0]}.products")

    def _inputs_first(self, node: NodeProto, weight: PackedWeight, factor: np.ndarray | np.generic) -> str:
        """Write the int8 weight with inputs at its first dimension, as a matrix product needs it; return its name."""
        integers = self._int8(weight, factor)
        if weight.transposed == any(a.name == "transB" and a.i for a in node.attribute):
            return integers
        return self.writer.once("Transpose", [integers], f"{integers}.turned", perm=[1, 0])

    def _real(self, x: CodeTensor, operand: str) -> str:
        """Write the input in real units, and return its name."""
        return self.tensors.real(x, self.input_scales[operand])

    def _int8(self, weight: PackedWeight, factor: np.ndarray | np.generic) -> str:
        """Write the unpacked weight times `factor`, as int8, and return its name."""
        codes = weight.named("weight_codes")
        name = f"{codes}.int8"
        if not self.writer.begin(name):
            return name
        operand = f"{codes}.integers"
        add_weight(self.writer, codes, weight.codes, weight.bits, weight.grid, operand)
        values = np.unique(factor)
        if values.size > 1:
            shaped = factor.astype(np.float32).reshape(-1, *(1,) * (weight.codes.ndim - 1))
            by = self.writer.constant(weight.named("weight_factor"), shaped)
            operand = self.writer.node("Mul", [operand, by], f"{codes}.multiplied")
        elif values.size and values[0] != 1:
            by = self.writer.constant(f"daq.factor{values[0]}", np.float32(values[0]))
            operand = self.writer.node("Mul", [operand, by], f"{codes}.multiplied")
        return self.writer.node("Cast", [operand], name, to=INT8)


def weight_scale(sum_scale: np.ndarray, x_scale: np.float32) -> np.ndarray:
    """Return float32 `w` for which `x_scale * w` is `sum_scale` in float32; if there is none, the rounded quotient."""
    best = (sum_scale.astype(np.float64) / np.float64(x_scale)).astype(np.float32)
    for direction in (-np.inf, np.inf):
        other = np.nextafter(best, np.float32(direction))
        better = (x_scale * best != sum_scale) & (x_scale * other == sum_scale)
        best = np.where(better, other, best)
    return np.asarray(best, dtype=np.float32)
