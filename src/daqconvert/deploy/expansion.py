"""From placeholders to standard ONNX: every frozen layer's operators written out, every tensor under its dotted name.

    InputOperand   QuantizeLinear(x, scale, zero_point) -> Clip(codes, max = n) -> Cast -> Sub(zero_point)
    WeightOperand  packed bit planes and the nodes of `unpacking`
    Rescale        Mul(sum, scale) -> Add(bias)

`NAME.input_codes` is the uint8 tensor of the input's codes, `NAME.output` the layer's output; a weight that depends on
the data has `NAME.weight_codes` likewise. The `k`-th further call of one layer appends `.k`. The model's metadata says
under `daqconvert.layers` which tensors belong to which layer: two layers that quantize the same tensor alike share its
codes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from daqconvert.deploy.lowering import BATCH
from daqconvert.deploy.operators import DOMAIN
from daqconvert.deploy.unpacking import Parts, add_weight

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

LAYERS_KEY = "daqconvert.layers"


class Expansion:
    """One pass over a graph: ordinary nodes are kept, placeholders are replaced."""

    def __init__(self, model: ModelProto) -> None:
        from onnx import numpy_helper

        self.model = model
        self.parts = Parts()
        self.values = {t.name: t for t in model.graph.initializer}
        self.read = numpy_helper.to_array
        self.outputs = {o.name for o in model.graph.output}
        self.renamed: dict[str, str] = {}
        self.layers: dict[str, dict[str, list[str]]] = {}
        self.operands: dict[tuple[Any, ...], tuple[str, str]] = {}
        self.plain = set(_names_used(n for n in model.graph.node if n.domain != DOMAIN))

    def run(self) -> ModelProto:
        """Replace all placeholders in the model and return it."""
        write: dict[str, Callable[[NodeProto, dict[str, Any]], None]] = {
            "InputOperand": self._input, "WeightOperand": self._weight, "Rescale": self._rescale,
        }  # fmt: skip
        for node in self.model.graph.node:
            for i, name in enumerate(node.input):
                node.input[i] = self.renamed.get(name, name)
            if node.domain == DOMAIN:
                write[node.op_type](node, {a.name: a.i if a.type == 2 else a.s.decode() for a in node.attribute})
            else:
                del node.metadata_props[:]  # stack traces: they name files of this machine
                node.doc_string = ""
                self.parts.nodes.append(node)
        self._finish()
        return self.model

    def _input(self, node: NodeProto, given: dict[str, Any]) -> None:
        """Write an input quantizer; one that reads the same tensor with the same numbers is shared."""
        x, bits = node.input[0], given["bits"]
        layer, _, role = given["layer"].partition("::")  # written by `layers.frozen_site`: whose operand it is
        role = role or "input"
        scale, zero_point = (self.read(self.values[name]) for name in node.input[1:3])
        key = (x, bits, scale.item(), zero_point.item())
        if key not in self.operands:
            scale_name = self.parts.constant(_join(layer, f"{role}_scale"), scale)
            zero_name = self.parts.constant(_join(layer, f"{role}_zero_point"), zero_point)
            codes = self._unused(layer, "codes", f"{role}_codes")
            first = codes if bits == 8 else f"{codes}.unclipped"
            self.parts.node("QuantizeLinear", [x, scale_name, zero_name], first)
            if bits < 8:
                top = self.parts.constant(f"daq.code{2**bits - 1}", np.uint8(2**bits - 1))
                self.parts.node("Clip", [first, "", top], codes)
            # NOTE: no DequantizeLinear: ONNX Runtime takes it as leave to round the weights and bias beside it anew
            operand = self.parts.node("Cast", [codes], f"{codes}.operand", to=1)  # TensorProto.FLOAT
            if zero_point.item():
                zero = self.parts.constant(f"daq.zero{zero_point.item()}", np.float32(zero_point.item()))
                operand = self.parts.node("Sub", [operand, zero], f"{operand}.centred")
            self.operands[key] = (codes, operand)
        codes, operand = self.operands[key]
        self._entry(layer)["codes"].append(codes)
        self.renamed[node.output[0]] = operand

    def _weight(self, node: NodeProto, given: dict[str, Any]) -> None:
        """Write a weight; a layer that is called again uses the one that is there."""
        name = _join(given["layer"], "weight_codes")
        output = _join(given["layer"], "weight")
        if name not in self.parts.initializers:
            codes = self.read(self.values[node.input[0]])
            add_weight(self.parts, name, codes, given["bits"], given["grid"], output)
        self.renamed[node.output[0]] = output

    def _rescale(self, node: NodeProto, given: dict[str, Any]) -> None:
        """Write `sum * scale + bias`, the vectors shaped to stand at the channel's dimension."""
        acc, layer, output = node.input[0], given["layer"], node.output[0]
        if output not in self.outputs:
            output = self._unused(layer, "outputs", "output")
            self.renamed[node.output[0]] = output
        self._entry(layer)["outputs"].append(output)
        scale = self._vector(layer, "scale", node.input[1], given["output_dims"])
        if len(node.input) < 3 or not node.input[2]:
            self.parts.node("Mul", [acc, scale], output)
            return
        bias = self._vector(layer, "bias", node.input[2], given["output_dims"])
        self.parts.node("Add", [self.parts.node("Mul", [acc, scale], f"{output}.scaled"), bias], output)

    def _vector(self, layer: str, key: str, source: str, output_dims: int) -> str:
        value = self.read(self.values[source])
        shaped = value.reshape(-1, *(1,) * output_dims) if value.ndim else value
        name = _join(layer, key)
        # NOTE: the exporter merges equal tensors, so another node may read this one in its own shape
        return self.parts.constant(f"{name}.shaped" if name in self.plain and shaped.ndim > 1 else name, shaped)

    def _entry(self, layer: str) -> dict[str, list[str]]:
        return self.layers.setdefault(layer, {"codes": [], "outputs": []})

    def _unused(self, layer: str, kind: str, key: str) -> str:
        """Return `NAME.key`, or `NAME.key.k` for a further call of the same layer."""
        first = _join(layer, key)
        calls = sum(name == first or name.startswith(f"{first}.") for name in self._entry(layer)[kind])
        return f"{first}.{calls}" if calls else first

    def _finish(self) -> None:
        graph, parts = self.model.graph, self.parts
        del graph.node[:]
        graph.node.extend(parts.nodes)
        used = set(_names_used(parts.nodes)) | {o.name for o in graph.output}
        kept = [t for t in graph.initializer if t.name in used and t.name not in parts.initializers]
        for tensor in kept:
            del tensor.metadata_props[:]
        del graph.initializer[:]
        graph.initializer.extend([*kept, *(t for t in parts.initializers.values() if t.name in used)])
        del graph.value_info[:]
        for entry in [o for o in self.model.opset_import if o.domain == DOMAIN]:
            self.model.opset_import.remove(entry)
        if self.layers:
            entry = self.model.metadata_props.add()
            entry.key, entry.value = LAYERS_KEY, json.dumps(self.layers, separators=(",", ":"))


def expand(model: ModelProto, output_names: list[str]) -> ModelProto:
    """Return the model with placeholders written out, outputs renamed, and traces of this machine removed.

    Args:
        model: From `lowering.lower`; changed in place.
        output_names: One per output of the graph.
    """
    del model.metadata_props[:]
    del model.graph.metadata_props[:]
    model.producer_name, model.producer_version, model.doc_string = "daqconvert", "", ""
    model.graph.name, model.graph.doc_string = "model", ""
    _rename_outputs(model, output_names)
    _name_batch(model)
    return Expansion(model).run()


def layer_tensors(metadata: dict[str, str]) -> dict[str, dict[str, list[str]]]:
    """Return, per frozen layer, the names of its code and output tensors, from an ONNX file's metadata."""
    return json.loads(metadata.get(LAYERS_KEY, "{}"))


def _join(layer: str, key: str) -> str:
    return f"{layer}.{key}" if layer else key


def _names_used(nodes: Iterable[NodeProto]) -> Iterable[str]:
    for node in nodes:
        yield from node.input
        for attribute in node.attribute:
            for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _names_used(graph.node)


def _rename_outputs(model: ModelProto, output_names: list[str]) -> None:
    graph = model.graph
    taken = {i.name for i in graph.input} | {t.name for t in graph.initializer}
    names = {o.name: new for o, new in zip(graph.output, output_names, strict=True) if o.name not in taken}
    for output in graph.output:
        output.name = names.get(output.name, output.name)
    for node in graph.node:
        for values in (node.input, node.output):
            for i, name in enumerate(values):
                values[i] = names.get(name, name)


def _name_batch(model: ModelProto) -> None:
    """Give the open dimension its name, in the inputs and in whatever an output's size is computed from it."""
    symbols = {d.dim_param for i in model.graph.input for d in i.type.tensor_type.shape.dim if d.dim_param}
    for value in (*model.graph.input, *model.graph.output):
        del value.metadata_props[:]
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                pattern = rf"\b({'|'.join(map(re.escape, symbols))})\b"
                dim.dim_param = re.sub(pattern, BATCH, dim.dim_param) if symbols else dim.dim_param
