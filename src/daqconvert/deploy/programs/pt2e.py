"""From a frozen model of integer form to one program of `torch.export` in PT2E form, which every runtime can be given.

    layer with codes as output   quantize(clip(conv(dequantize(x), dequantize(w), bias)))
    layer with float output      conv(dequantize(x), dequantize(w), bias)
    anything else                as the model computes it, on dequantized values

`quantize` and `dequantize` are torch's operators `quantized_decomposed`. The frozen model is traced first, with each
of its layers as the operators of `frozen_operators`; then its nodes are written anew, one after the other. A value
that is known to be codes (`Codes`) is dequantized only where a node reads it, and quantized again behind a node that
only moves elements (a max pool, a reshape), which changes no code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor, fx, nn

from daqconvert.deploy.batch_dimension import Batch, open_batch
from daqconvert.deploy.onnx.integer_nodes import weight_scale
from daqconvert.deploy.onnx.lowering import first_lines, fixed_batch_hint, float32_copy, open_dimensions, quiet, traced
from daqconvert.deploy.programs.code_flow import (
    ATEN,
    DYNAMIC,
    OURS,
    PRODUCTS,
    SAME,
    VIEWS,
    Codes,
    clips_nothing,
    moves,
    read_as_codes,
)
from daqconvert.deploy.programs.dialects import DIALECTS, INT8, Dialect
from daqconvert.deploy.signature import Arguments, example_arguments, input_tensors
from daqconvert.errors import ExportError, nearest
from daqconvert.functional.grid import weight_operand
from daqconvert.functional.integer import LARGEST_WEIGHT, IntegerLayer
from daqconvert.layers import FrozenSite

QDQ = torch.ops.quantized_decomposed
WEIGHTS = (-LARGEST_WEIGHT, LARGEST_WEIGHT)


@dataclass(frozen=True)
class Operand:
    """The integers `code - zero_point` that a frozen layer multiplies."""

    codes: Codes


@dataclass(frozen=True)
class Weight:
    """The integers that a frozen layer multiplies its input by, and the layer's name."""

    integers: Tensor
    layer: str


@dataclass(frozen=True)
class DeferredProduct:
    """A product of two operands that is written by the node that reads it, because this node knows the units."""

    node: fx.Node


@dataclass(frozen=True)
class Lowered:
    """A program, and where its codes belong.

    Attributes:
        program: What `torch.export` made of it.
        layers: Name of a layer or output quantizer -> indices into `codes`, one for each call.
        codes: All code tensors, in order; with `watched` the program returns their values behind its own outputs.
        outputs: Number of the program's own outputs.
    """

    program: torch.export.ExportedProgram
    layers: dict[str, list[int]]
    codes: tuple[Codes, ...]
    outputs: int


def program(
    frozen: nn.Module, example_inputs: Any, *, target: str = "onnxruntime", dynamic_batch: bool | Sequence[str] = True
) -> torch.export.ExportedProgram:
    """Return a frozen model as one `torch.export` program in PT2E form, in the dialect of a target.

    Quantized values are `torch.ops.quantized_decomposed` `quantize` and `dequantize` around float operators, weights
    are int8 constants, batch norms are folded. Backends that take models quantized by PT2E take this program.

    Args:
        frozen: A model from `freeze` or `load` with `deploy="integer"`; it is not changed.
        example_inputs: A tensor, a tuple of positional or a dict of keyword arguments.
        target: Name of the runtime whose dialect is wanted.
        dynamic_batch: Whether the batch is left open, or the names of the inputs that carry it, as in `export`.

    Returns:
        A program that takes the input tensors one after the other and returns a tuple of the output tensors.

    Raises:
        ExportError: If there is no such target, or the model is not frozen for integer deployment or cannot be traced.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
        >>> x = torch.randn(2, 3, 8, 8)
        >>> qmodel = dq.quantize(model, deploy="integer")
        >>> report = dq.calibrate(qmodel, [x])
        >>> frozen = dq.freeze(qmodel)
        >>> exported = dq.program(frozen, x, target="executorch")
        >>> bool((exported.module()(x)[0] - frozen(x)).abs().max() < 1e-4)
        True
    """
    dialect = DIALECTS.get(target)
    if dialect is None:
        raise ExportError(
            f"program: {target!r} has no dialect.{nearest(target, DIALECTS)} Dialects are: {', '.join(DIALECTS)}."
        )
    sites = [module for module in frozen.modules() if isinstance(module, FrozenSite)]
    if not any(site.is_integer for site in sites):
        raise ExportError(
            f"program: {type(frozen).__name__} has no layer whose output is codes, which every dialect needs. "
            f'Quantize the float model with deploy="integer" (or target={target!r}), calibrate and freeze it.'
        )
    twin, arguments = float32_copy(frozen), example_arguments(example_inputs)
    return lower_frozen(twin, arguments, open_batch(twin, arguments, dynamic_batch), dialect).program


def lower_frozen(
    model: nn.Module, arguments: Arguments, batch: Batch | None, dialect: Dialect, watched: bool = False
) -> Lowered:
    """Return the program of a frozen model that `float32_copy` made, in a dialect.

    With `watched` it returns, behind its own outputs, the real values of all its code tensors.

    Raises:
        ExportError: If torch cannot follow the model, or a zero point does not fit the dialect.
    """
    writer = Writer(traced(model, arguments, batch).run_decompositions({}), dialect)
    module = writer.write(watched)
    tensors = input_tensors(arguments if batch is None else batch.several(arguments))
    try:
        with torch.no_grad(), quiet():
            shapes = open_dimensions(len(tensors), batch)
            exported = torch.export.export(module, tuple(tensors), dynamic_shapes=shapes and shapes[0], strict=False)
    except Exception as error:  # NOTE: torch raises many kinds
        raise ExportError(
            f"export: torch.export cannot follow the program of {type(model).__name__}: {first_lines(error)}"
            f"{fixed_batch_hint(batch)}"
        ) from error
    return Lowered(exported, writer.layers, tuple(writer.codes), writer.outputs)


class Writer:
    """Writes the nodes of a traced frozen model anew, in a dialect.

    Attributes:
        layers: Name of a layer or output quantizer -> indices into `codes`.
        codes: All code tensors that were written, in order.
        outputs: Number of outputs of the model.
    """

    def __init__(self, traced_model: torch.export.ExportedProgram, dialect: Dialect) -> None:
        import torch.ao.quantization.fx._decomposed  # noqa: F401 # registers `quantized_decomposed`

        self.traced, self.dialect = traced_model, dialect
        self.graph, self.root = fx.Graph(), nn.Module()
        self.env: dict[fx.Node, Any] = {}
        self.tensors: dict[fx.Node, Tensor] = {}
        self.layers: dict[str, list[int]] = {}
        self.codes: list[Codes] = []
        self.outputs = 0
        self._grids: dict[tuple[Any, ...], Codes] = {}
        self._real: dict[tuple[fx.Node, float], fx.Node] = {}
        self._held: dict[fx.Node, fx.Node] = {}
        self._places: dict[fx.Node, int] = {}

    def write(self, watched: bool) -> fx.GraphModule:
        """Return the module that computes the program."""
        signature = self.traced.graph_signature
        held = {
            **signature.inputs_to_parameters, **signature.inputs_to_buffers,
            **signature.inputs_to_lifted_tensor_constants,
        }  # fmt: skip
        stored = self.traced.state_dict | self.traced.constants
        special = {
            OURS.input_operand.default: self._input, OURS.round_to_grid.default: self._round,
            OURS.weight_operand.default: self._weight, OURS.requantize.default: self._requantize,
            OURS.rescale.default: self._rescale,
        }  # fmt: skip
        for node in self.traced.graph.nodes:
            if node.op == "placeholder":
                name = held.get(node.name)
                if name is not None:
                    self.tensors[node] = stored[name]
                else:
                    self.env[node] = self.graph.placeholder(node.name)
            elif node.op == "output":
                results = [self._value(value) for value in node.args[0]]
                self.outputs = len(results)
                seen = [self._dequantize(codes) for codes in self.codes] if watched else []
                self.graph.output((*results, *seen))
            else:
                special.get(node.target, self._ordinary)(node)
        self.graph.eliminate_dead_code()
        return fx.GraphModule(self.root, self.graph)

    def _call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.graph.call_function(target, args, kwargs)

    def _constant(self, name: str, tensor: Tensor) -> fx.Node:
        name = name.replace(".", "_") or "root"
        while hasattr(self.root, name):
            name += "_"
        self.root.register_buffer(name, tensor.detach().contiguous())
        return self.graph.get_attr(name)

    def _value(self, value: Any) -> Any:
        """Return what a node's argument is in the program: a float value where it was a tensor."""
        if not isinstance(value, fx.Node):
            return value
        if value in self.tensors:
            if value not in self._held:
                self._held[value] = self._constant(value.name, self.tensors[value])
            return self._held[value]
        found = self.env[value]
        if isinstance(found, Codes):
            return self._dequantize(found)
        if isinstance(found, Operand):
            return self._dequantize(dataclasses.replace(found.codes, scale=1.0))
        if isinstance(found, Weight):
            return self._constant(f"{found.layer}_weight", found.integers.float())
        if isinstance(found, DeferredProduct):
            args = fx.map_arg(value.args, self._value)
            self.env[value] = self._call(value.target, *args, **value.kwargs)
            return self.env[value]
        return found

    def _ordinary(self, node: Any) -> None:
        """Write a node that belongs to no frozen layer: on codes where it only moves them, else on real values."""
        args = node.args
        first, second = (self.env.get(arg) if isinstance(arg, fx.Node) else None for arg in (*args, None, None)[:2])
        if node.target in SAME and first is not None:
            self.env[node] = first
        elif isinstance(first, Operand) and (
            (node.target in PRODUCTS and isinstance(second, Weight))
            or (node.target in DYNAMIC and isinstance(second, Operand))
        ):
            self.env[node] = DeferredProduct(node)
        elif isinstance(first, Codes) and clips_nothing(node, first):
            self.env[node] = first
        else:
            moved = self._moved(node)
            written = fx.map_arg(args, lambda n: self._dequantize(moved) if moved and n is args[0] else self._value(n))
            # copies are left out, so a view may meet another layout than the one that it was traced with
            target = ATEN.reshape.default if node.target in VIEWS else node.target
            result = self._call(target, *written, **fx.map_arg(node.kwargs, self._value))
            self.env[node] = result
            if moved is not None and (isinstance(first, Operand) or read_as_codes(node)):
                low, high = (limit + self._shift(moved.zero_point) for limit in self._limits())  # needs no clip
                again = self._quantized(result, moved.scale, moved.zero_point, low, high)
                again = dataclasses.replace(again, low=moved.low, high=moved.high)
                self.env[node] = Operand(again) if isinstance(first, Operand) else again

    def _moved(self, node: Any) -> Codes | None:
        """Return the codes that a node moves, if it does nothing else to them; of several, the first."""
        if node.target is ATEN.cat.default:
            parts = [self.env.get(part) for part in node.args[0]]
            alike = [part for part in parts if isinstance(part, Codes) and part.same_grid(parts[0])]
            if len(alike) < len(parts):
                return None
            low, high = min(part.low for part in alike), max(part.high for part in alike)
            return dataclasses.replace(alike[0], low=low, high=high)
        found = self.env.get(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None
        codes = found.codes if isinstance(found, Operand) else found
        return codes if isinstance(codes, Codes) and moves(node) else None

    def _input(self, node: Any) -> None:
        layer = str(node.args[4]).partition("::")[0]  # `::weight` follows for a weight that depends on data
        self.env[node] = Operand(self._on_grid(node, layer))

    def _round(self, node: Any) -> None:
        self.env[node] = self._on_grid(node, str(node.args[4]))

    def _on_grid(self, node: Any, layer: str) -> Codes:
        """Return the codes of a value on a quantizer's grid; nothing is written if they exist."""
        x, scale, zero_point, bits = node.args[:4]
        numbers, top = (self.tensors[scale].item(), int(self.tensors[zero_point])), 2**bits - 1
        found = self.env.get(x)
        known = isinstance(found, Codes) and (found.scale, found.zero_point) == numbers and found.high <= top
        codes = found if known else self._grids.get((x, bits, *numbers))
        if codes is None:
            codes = self._quantized(self._value(x), *numbers, 0, top, layer)
            self._grids[x, bits, *numbers] = codes
        self._note(layer, codes)
        return codes

    def _note(self, layer: str, codes: Codes) -> None:
        place = self._places.setdefault(codes.node, len(self.codes))
        if place == len(self.codes):
            self.codes.append(codes)
        self.layers.setdefault(layer, []).append(place)

    def _weight(self, node: Any) -> None:
        codes, bits, grid, layer = node.args
        self.env[node] = Weight(weight_operand(self.tensors[codes], bits, grid, torch.float32), str(layer))

    def _requantize(self, node: Any) -> None:
        """Write a layer whose output is codes."""
        acc, layer, dims = node.args[0], str(node.args[9]), int(node.args[8])
        x_scale, *fields = (self.tensors[value] for value in node.args[1:8])
        numbers = IntegerLayer(*fields)
        unit, product = numbers.sum_scale(x_scale), self.env[acc]
        if isinstance(product, DeferredProduct):
            x, w = self._operands(product)
            integers = w.integers * _before(numbers.factor.float(), w.integers.dim() - 1)
            weight = self._weight_node(layer, integers, numbers.weight_scale)
            y = self._product(product.node, self._dequantize(x.codes), weight, self._bias(layer, numbers.bias, unit))
        else:
            scale, bias = (_before(value.float() * unit, dims) for value in (numbers.factor, numbers.bias))
            y = self._scaled(layer, self._value(acc), scale, self._constant(f"{layer}_bias", bias))
        low, high = numbers.range.tolist()
        self.env[node] = self._quantized(y, numbers.scale.item(), int(numbers.zero_point), low, high, layer)

    def _rescale(self, node: Any) -> None:
        """Write a layer whose output is float."""
        acc, scale_node, bias_node, dims, layer = node.args
        scale, product = self.tensors[scale_node].float(), self.env[acc]
        if isinstance(product, DeferredProduct) and isinstance(self._operands(product)[1], Weight):
            x, w = self._operands(product)
            inner = w.integers.dim() - 1
            channels = scale.abs().expand(w.integers.shape[0]).contiguous()
            scales = torch.from_numpy(weight_scale(channels.numpy(), numpy.float32(x.codes.scale)))
            linear = product.node.target is ATEN.linear.default
            integers = w.integers * _before(torch.where(scale < 0, -1.0, 1.0), inner)
            if (linear and self.dialect.float_linear == "float") or integers.abs().max() > LARGEST_WEIGHT:
                weight = self._constant(f"{layer}_weight", integers * _before(scales, inner))
            else:
                weight = self._weight_node(str(layer), integers, scales)
            added = self._float_bias(layer, bias_node, 0)
            self.env[node] = self._product(product.node, self._dequantize(x.codes), weight, added)
            return
        inner = int(dims)
        added = self._float_bias(layer, bias_node, inner)
        self.env[node] = self._scaled(layer, self._value(acc), _before(scale, inner), added)

    def _float_bias(self, layer: str, bias: fx.Node | None, inner: int) -> fx.Node | None:
        """Write a layer's float bias, which the model may compute, for a channel that `inner` dimensions follow."""
        if bias is None:
            return None
        if bias in self.tensors:
            return self._constant(f"{layer}_bias", _before(self.tensors[bias], inner))
        value: fx.Node = self._value(bias)
        return self._call(ATEN.reshape.default, value, (-1, *(1,) * inner)) if inner else value

    def _scaled(self, layer: str, sums: fx.Node, scale: Tensor, bias: fx.Node | None) -> fx.Node:
        """Write `sums * scale + bias` for integer-valued sums that a layer's product could not be joined with."""
        y = self._call(ATEN.mul.Tensor, sums, self._constant(f"{layer}_scale", scale))
        return y if bias is None else self._call(ATEN.add.Tensor, y, bias)

    def _operands(self, product: DeferredProduct) -> tuple[Any, Any]:
        x, w = product.node.args[:2]
        return self.env[x], self.env[w]  # type: ignore[index] # both are nodes

    def _product(self, node: Any, x: fx.Node, weight: fx.Node, bias: fx.Node | None) -> fx.Node:
        return self._call(node.target, x, weight, bias, *node.args[3:], **node.kwargs)

    def _weight_node(self, layer: str, integers: Tensor, scales: Tensor) -> fx.Node:
        """Write a weight in real units from int8 codes, one scale for each output channel."""
        scale = self._constant(f"{layer}_weight_scale", scales.float())
        zeros = self._constant(f"{layer}_weight_zero_point", torch.zeros(scales.shape, dtype=torch.int64))
        if self.dialect.weight == "values":
            values = self._constant(f"{layer}_weight", integers * _before(scales, integers.dim() - 1))
            codes = self._call(QDQ.quantize_per_channel.default, values, scale, zeros, 0, *WEIGHTS, INT8)
        else:
            codes = self._constant(f"{layer}_weight", integers.to(INT8))
        return self._call(QDQ.dequantize_per_channel.default, codes, scale, zeros, 0, *WEIGHTS, INT8)

    def _bias(self, layer: str, codes: Tensor, unit: Tensor) -> fx.Node:
        if self.dialect.bias == "values":
            return self._constant(f"{layer}_bias", (codes.double() * unit.double()).float())
        scale = self._constant(f"{layer}_bias_scale", unit)
        zeros = self._constant(f"{layer}_bias_zero_point", torch.zeros(unit.shape, dtype=torch.int64))
        integers, limit = self._constant(f"{layer}_bias", codes.to(torch.int32)), 2**31 - 1
        return self._call(
            QDQ.dequantize_per_channel.default, integers, scale, zeros, 0, -limit - 1, limit, torch.int32
        )

    def _shift(self, zero_point: int) -> int:
        """Return what the dialect's codes are less than those of the frozen model."""
        if self.dialect.symmetric:
            return zero_point
        return 128 if self.dialect.codes is INT8 else 0

    def _limits(self) -> tuple[int, int]:
        return (-128, 127) if self.dialect.codes is INT8 else (0, 255)

    def _quantized(self, real: fx.Node, scale: float, zero_point: int, low: int, high: int, layer: str = "") -> Codes:
        """Write the codes of a real value, clipped to `low .. high`."""
        shift, (least, most) = self._shift(zero_point), self._limits()
        if self.dialect.symmetric and not (least <= low - shift and high - shift <= most):
            raise ExportError(
                f"{layer or '(root)'}: codes {low} to {high} with zero point {zero_point} do not fit into int8 with "
                'zero point 0. Quantize the float model with target="tensorrt".'
            )
        lower = low if low - shift > least else None
        upper = high if high - shift < most else None
        node = real if self.dialect.clip != "float" else self._clip(real, scale, zero_point, lower, upper)
        numbers = (scale, zero_point - shift, least, most, self.dialect.codes)
        node = self._call(QDQ.quantize_per_tensor.default, node, *numbers)
        if self.dialect.clip == "codes" and (lower, upper) != (None, None):
            bounds = (None if code is None else code - shift for code in (lower, upper))
            node = self._call(ATEN.clamp.default, node, *bounds)
        elif self.dialect.clip == "apart" and (lower, upper) != (None, None):
            node = self._call(QDQ.dequantize_per_tensor.default, node, *numbers)
            node = self._clip(node, scale, zero_point, lower, upper)
            node = self._call(QDQ.quantize_per_tensor.default, node, *numbers)
        return Codes(node, scale, zero_point, low, high)

    def _clip(self, real: fx.Node, scale: float, zero_point: int, lower: int | None, upper: int | None) -> fx.Node:
        """Write a clip of real values to those of two codes; None is no bound."""
        if lower is None and upper is None:
            return real
        if upper is None and lower == zero_point:
            return self._call(ATEN.relu.default, real)
        ends = (0 if lower is None else lower, 255 if upper is None else upper)
        return self._call(ATEN.hardtanh.default, real, *((code - zero_point) * scale for code in ends))

    def _dequantize(self, codes: Codes) -> fx.Node:
        """Write the real values of codes; once if the dialect shares them among readers."""
        key = (codes.node, codes.scale)
        if key not in self._real or not self.dialect.shared:
            least, most = self._limits()
            numbers = (codes.scale, codes.zero_point - self._shift(codes.zero_point), least, most, self.dialect.codes)
            self._real[key] = self._call(QDQ.dequantize_per_tensor.default, codes.node, *numbers)
        return self._real[key]


def _before(value: Tensor, inner: int) -> Tensor:
    """Return numbers of channels, or the number of all, in a shape that broadcasts before `inner` dimensions."""
    return value.reshape(-1, *(1,) * inner) if value.dim() and inner else value
