"""From placeholders to standard ONNX: the operators of every frozen layer written out, tensors under plain names.

    InputOperand, RoundToGrid   QuantizeLinear(x, scale, zero_point) -> Clip(codes, max = n)
    WeightOperand               packed bit planes and the nodes of `unpacking`
    Rescale                     Mul(sum, scale) -> Add(bias); the products of a linear as in `integer_nodes`
    Requantize                  the integer layer of `integer_nodes`

`NAME.input_codes` is the uint8 tensor of a layer's input codes, unless those are the codes of another layer's output;
`NAME.output` is the layer's output in float, `NAME.output_codes` are its codes in integer deployment; a weight that
depends on the data has its codes in `NAME.weight_codes`. Names of the `k`-th further call of a layer end in `.k`. The
model's metadata says under `daqconvert.layers` which tensors belong to which layer, and holds the scale and zero point
of every output that is held as codes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from daqconvert.deploy.onnx.code_tensors import CodeTensor, CodeTensors, attributes
from daqconvert.deploy.onnx.frozen_operators import DOMAIN
from daqconvert.deploy.onnx.integer_nodes import PackedWeight, ProductWriter
from daqconvert.deploy.onnx.lowering import BATCH, rename, tensor_names
from daqconvert.deploy.onnx.unpacking import GraphWriter
from daqconvert.deploy.signature import distinct
from daqconvert.functional.integer import CodeGrid

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

LAYERS_KEY = "daqconvert.layers"
OWN = "own::"  # before the names of the model's own tensors while others are written, which yield to them in the end


def expand(model: ModelProto, output_names: list[str]) -> ModelProto:
    """Return the model of `lowering.lower`, changed in place, with its placeholders written out.

    The outputs are renamed to `output_names`, and what describes the machine that exported the model is removed.
    """
    del model.metadata_props[:]
    del model.graph.metadata_props[:]
    model.producer_name, model.producer_version, model.doc_string = "daqconvert", "", ""
    model.graph.name, model.graph.doc_string = "model", ""
    _name_outputs(model, output_names)
    _name_batch(model)
    rename(model.graph, {name: f"{OWN}{name}" for name in tensor_names(model.graph)})
    return Expansion(model).run()


def layer_tensors(metadata: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Return, per frozen layer, the names of its code and output tensors, from an ONNX file's metadata.

    Outputs that are codes have their scale and zero point under `"grids"`.
    """
    found: dict[str, dict[str, Any]] = json.loads(metadata.get(LAYERS_KEY, "{}"))
    return found


class Expansion:
    """One pass over a graph: ordinary nodes are kept, placeholders are replaced."""

    def __init__(self, model: ModelProto) -> None:
        from onnx import numpy_helper

        self.model, self.writer = model, GraphWriter()
        nodes = model.graph.node
        self.values = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
        for node in nodes:
            if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
                self.values[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
        self.outputs = {o.name for o in model.graph.output}
        self.renamed: dict[str, str] = {}
        self.layers: dict[str, dict[str, Any]] = {}
        self.readers: dict[str, list[NodeProto]] = {}
        for node in nodes:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.tensors = CodeTensors(self.writer, self.values, self.outputs, self._rounded_to)
        self.products = ProductWriter(self.writer, self.tensors, self.values)
        self.quantized: dict[tuple[Any, ...], CodeTensor] = {}
        self.endings = {n.input[0]: n for n in nodes if n.domain == DOMAIN and n.op_type in ("Requantize", "Rescale")}

    def run(self) -> ModelProto:
        """Replace all placeholders in the model and return it."""
        write: dict[str, Callable[[NodeProto, dict[str, Any]], None]] = {
            "InputOperand": self._input, "WeightOperand": self._weight, "Rescale": self._rescale,
            "Requantize": self._requantize, "RoundToGrid": self._round,
        }  # fmt: skip
        for node in self.model.graph.node:
            for i, name in enumerate(node.input):
                node.input[i] = self.renamed.get(name, name)
            if node.domain == DOMAIN:
                write[node.op_type](node, attributes(node))
            else:
                del node.metadata_props[:]  # stack traces: they name files of this machine
                node.doc_string = ""
                self._ordinary(node)
        self._finish()
        return self.model

    def _ordinary(self, node: NodeProto) -> None:
        """Write a node that is no placeholder: with integers where it multiplies or moves codes, else as it is."""
        ending = self.endings.get(node.output[0]) if node.output else None
        if (ending is not None and self.products.write(node, ending)) or self.products.move(node):
            return
        for name in node.input:
            self.products.float_weight(name)
        if not self.tensors.write(node):
            self.writer.nodes.append(node)

    def _input(self, node: NodeProto, given: dict[str, Any]) -> None:
        """Write an input quantizer; layers that quantize the same tensor with the same numbers share one."""
        layer, _, role = given["layer"].partition("::")  # `layers.frozen_site` appends `::weight` for a weight
        tensor = self._quantize(node, given["bits"], layer, role or "input")
        self._entry(layer)["codes"].append(tensor.codes)
        self.tensors.known[node.output[0]] = tensor.as_operand()
        self.products.input_scales[node.output[0]] = tensor.scale_name
        self.values.setdefault(tensor.scale_name, np.asarray(tensor.scale, dtype=np.float32))

    def _round(self, node: NodeProto, given: dict[str, Any]) -> None:
        """Write an output quantizer."""
        tensor = self._quantize(node, given["bits"], given["layer"], "input")
        entry = self._entry(given["layer"])
        entry["codes"].append(tensor.codes)
        self._coded_output(entry, tensor)
        self._result(node.output[0], tensor)

    def _quantize(self, node: NodeProto, bits: int, layer: str, role: str) -> CodeTensor:
        """Return the codes of a tensor on a grid; nodes are written only if these codes do not exist yet."""
        x = node.input[0]
        scale, zero_point = (self.values[name] for name in node.input[1:3])
        numbers = (scale.item(), zero_point.item())
        known = self.tensors.known.get(x)
        fits = known is not None and not known.is_operand and known.high < 2**bits
        if known is not None and fits and (known.scale, known.zero_point) == numbers:
            return known
        key = (x, bits, *numbers)
        if key not in self.quantized:
            scale_name = self.writer.constant(_join(layer, f"{role}_scale"), scale)
            zero_name = self.writer.constant(_join(layer, f"{role}_zero_point"), zero_point)
            codes = self._unused(layer, "codes", f"{role}_codes")
            first = codes if bits == 8 else f"{codes}.unclipped"
            # NOTE: ONNX Runtime replaces two grids in a row, as they stand, by a third that lies between them
            self.writer.node("QuantizeLinear", [self.tensors.float_value(x), scale_name, zero_name], first)
            if bits < 8:
                top = self.writer.constant(f"daq.code{2**bits - 1}", np.uint8(2**bits - 1))
                self.writer.node("Clip", [first, "", top], codes)
            self.quantized[key] = CodeTensor(codes, scale_name, zero_name, *numbers, 0, 2**bits - 1)
        return self.quantized[key]

    def _rounded_to(self, name: str) -> CodeGrid | None:
        """Return the grid that a float tensor is rounded to, if nothing else reads it.

        If the zero point is 0, a ReLU may stand between, because the grid has no negative values then.
        """
        readers = self.readers.get(name, [])
        if len(readers) != 1 or name in self.outputs:
            return None
        (node,) = readers
        if node.op_type == "Relu":
            found = self._rounded_to(node.output[0])
            return found if found is not None and found.zero_point == 0 else None
        if node.domain != DOMAIN or node.op_type not in ("InputOperand", "RoundToGrid"):
            return None
        return CodeGrid(self.values[node.input[1]].item(), self.values[node.input[2]].item())

    def _weight(self, node: NodeProto, given: dict[str, Any]) -> None:
        """Note a weight without writing it: the node that computes with it decides how it is unpacked."""
        codes = self.values[node.input[0]]
        self.products.weights[node.output[0]] = PackedWeight(given["layer"], codes, given["bits"], given["grid"])

    def _rescale(self, node: NodeProto, given: dict[str, Any]) -> None:
        """Write `sum * scale + bias`, with scale and bias shaped to broadcast along the dimension of the channels."""
        acc, layer, output = node.input[0], given["layer"], node.output[0]
        if output not in self.outputs:
            output = self._unused(layer, "outputs", "output")
            self.renamed[node.output[0]] = output
        self._entry(layer)["outputs"].append(output)
        has_bias = len(node.input) > 2 and bool(node.input[2])
        if acc in self.products.in_real_units:
            acc = self.products.in_real_units[acc]
            if not has_bias:
                self.writer.node("Identity", [acc], output)
        else:
            scale = self._vector(layer, "scale", node.input[1], given["output_dims"])
            scaled = f"{output}.scaled" if has_bias else output
            acc = self.writer.node("Mul", [self.tensors.value(acc), scale], scaled)
        if has_bias:
            bias = self._vector(layer, "bias", node.input[2], given["output_dims"])
            self.writer.node("Add", [acc, bias], output)

    def _requantize(self, node: NodeProto, given: dict[str, Any]) -> None:
        """Write the codes of a layer's output; its products are written already."""
        layer = given["layer"]
        entry = self._entry(layer)
        scale, zero_point, limits = (self.values[name] for name in node.input[5:8])
        codes = self._unused(layer, "outputs", "output_codes")
        tensor = CodeTensor(
            codes, self.writer.constant(_join(layer, "output_scale"), scale),
            self.writer.constant(_join(layer, "output_zero_point"), zero_point),
            scale.item(), zero_point.item(), int(limits[0]), int(limits[1]),
        )  # fmt: skip
        self.products.quantize(node, tensor)
        self._coded_output(entry, tensor)
        self._result(node.output[0], tensor)

    def _result(self, name: str, tensor: CodeTensor) -> None:
        """Let a code tensor stand for the float tensor `name`; if that is an output of the graph, write it as well."""
        self.tensors.known[name] = tensor
        if name in self.outputs:
            inputs = [tensor.codes, tensor.scale_name, tensor.zero_point_name]
            self.writer.node("DequantizeLinear", inputs, name)

    def _coded_output(self, entry: dict[str, Any], tensor: CodeTensor) -> None:
        """Note for the metadata that a layer's output is these codes."""
        entry["outputs"].append(tensor.codes)
        entry.setdefault("grids", {})[tensor.codes] = [tensor.scale, tensor.zero_point]

    def _vector(self, layer: str, key: str, source: str, output_dims: int) -> str:
        value = self.values[source]
        shaped = value.reshape(-1, *(1,) * output_dims) if value.ndim else value
        return self.writer.constant(_join(layer, key), shaped)

    def _entry(self, layer: str) -> dict[str, Any]:
        return self.layers.setdefault(layer, {"codes": [], "outputs": []})

    def _unused(self, layer: str, kind: str, key: str) -> str:
        """Return `NAME.key`, or `NAME.key.k` for a further call of the same layer."""
        first = _join(layer, key)
        calls = sum(name == first or name.startswith(f"{first}.") for name in self._entry(layer)[kind])
        return f"{first}.{calls}" if calls else first

    def _finish(self) -> None:
        graph, writer = self.model.graph, self.writer
        del graph.node[:]
        graph.node.extend(writer.nodes)
        used = set(_names_used(writer.nodes)) | {o.name for o in graph.output}
        plain = [t for t in graph.initializer if t.name in used and t.name not in writer.initializers]
        for tensor in plain:
            del tensor.metadata_props[:]
        del graph.initializer[:]
        graph.initializer.extend([*plain, *(t for t in writer.initializers.values() if t.name in used)])
        kept = _without_inference(writer.nodes, {o.domain: o.version for o in self.model.opset_import})
        known = [value for value in graph.value_info if value.name in kept]
        del graph.value_info[:]
        graph.value_info.extend(known)
        for entry in [o for o in self.model.opset_import if o.domain == DOMAIN]:
            self.model.opset_import.remove(entry)
        own = {name: name.removeprefix(OWN) for name in tensor_names(graph) if name.startswith(OWN)}
        names = rename(graph, own)
        for found in self.layers.values():
            for kind in ("codes", "outputs"):
                found[kind] = [names.get(name, name) for name in found[kind]]
            if "grids" in found:
                found["grids"] = {names.get(name, name): grid for name, grid in found["grids"].items()}
        if self.layers:
            entry = self.model.metadata_props.add()
            entry.key, entry.value = LAYERS_KEY, json.dumps(self.layers, separators=(",", ":"))


def _join(layer: str, key: str) -> str:
    return f"{layer}.{key}" if layer else key


def _names_used(nodes: Iterable[NodeProto]) -> Iterable[str]:
    for node in nodes:
        yield from node.input
        for attribute in node.attribute:
            for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _names_used(graph.node)


def _without_inference(nodes: Iterable[NodeProto], opsets: dict[str, int]) -> set[str]:
    """Return the outputs of nodes for which ONNX infers no types and shapes, functions and operators unknown to it."""
    from onnx import defs

    found: set[str] = set()
    for node in nodes:
        try:
            schema = defs.get_schema(node.op_type, opsets.get(node.domain, 1), node.domain)
        except defs.SchemaError:
            found |= set(node.output)
        else:
            found |= set() if schema.has_type_and_shape_inference_function else set(node.output)
    return found


def _name_outputs(model: ModelProto, output_names: list[str]) -> None:
    """Give the outputs their names; one that is an input, a parameter or another output as well is a copy of it."""
    from onnx import helper

    graph = model.graph
    given = [i.name for i in graph.input]
    copied = {*given, *(t.name for t in graph.initializer)}
    names = distinct(output_names, set(given))
    moved = {i: i for i in given}
    for output, name in zip(graph.output, names, strict=True):
        if output.name not in copied | moved.keys():
            moved[output.name] = name
    rename(graph, moved, reserved=names)
    for output, name in zip(graph.output, names, strict=True):
        if output.name != name:
            graph.node.append(helper.make_node("Identity", [output.name], [name]))
            output.name = name


def _name_batch(model: ModelProto) -> None:
    """Give the open dimension its name, in the inputs and in the sizes of outputs that are computed from it."""
    symbols = {d.dim_param for i in model.graph.input for d in i.type.tensor_type.shape.dim if d.dim_param}
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        del value.metadata_props[:]
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                pattern = rf"\b({'|'.join(map(re.escape, symbols))})\b"
                dim.dim_param = re.sub(pattern, BATCH, dim.dim_param) if symbols else dim.dim_param
