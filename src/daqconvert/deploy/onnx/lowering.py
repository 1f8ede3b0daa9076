"""From a torch model to an ONNX graph: `torch.export`, then `torch.onnx`, quietly and with plain errors.

A frozen layer arrives in the graph as the placeholders of `frozen_operators`, each under the layer's dotted name
(`named_layers`); `expansion` writes them out.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from daqconvert.deploy.batch_dimension import Batch
from daqconvert.deploy.onnx.frozen_operators import translations
from daqconvert.deploy.onnx.runtime import require_packages
from daqconvert.deploy.signature import Arguments, distinct, input_names, input_tensors, output_tensors
from daqconvert.errors import ExportError
from daqconvert.graph.rewrite import CODES, Rewritten
from daqconvert.layers import FrozenSite, QuantizedSite, is_site_type

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto


OPSET = 21
BATCH = "batch"
FLAT = "daq_model"  # the exporter puts it, and a dot, before the name of every parameter
LOGGERS = ("torch.onnx", "torch.export", "torch.fx.experimental.symbolic_shapes", "onnxscript", "onnx_ir")


def float32_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a model on the CPU, in float32, in evaluation mode."""
    twin = copy.deepcopy(model).cpu().float()
    for module in twin.modules():
        module.training = False
    return twin


def lower(model: nn.Module, arguments: Arguments, batch: Batch | None) -> ModelProto:
    """Return the ONNX graph of a model that `float32_copy` made; frozen layers become placeholders.

    The graph's inputs are `input_tensors(arguments)` under the names `input_names(model, arguments)`, its outputs
    `output_tensors` of the result, in this order. The first dimension of the inputs that carry the batch is left open.

    Raises:
        ExportError: If torch cannot export the model; the message says at which step and why.
    """
    require_packages()
    what, hint = type(model).__name__, fixed_batch_hint(batch)
    program = traced(model, arguments, batch)
    with quiet():
        try:
            result = torch.onnx.export(
                program, dynamo=True, opset_version=OPSET, verbose=False, custom_translation_table=translations()
            )
            assert result is not None
            proto = result.model_proto
        except Exception as error:  # NOTE: the exporter wraps any exception of a translation in its own
            raise ExportError(f"export: torch.onnx cannot write {what}: {first_lines(error)}{hint}") from error
    _name_inputs(proto.graph, input_names(model, arguments))
    return proto


def traced(model: nn.Module, arguments: Arguments, batch: Batch | None) -> torch.export.ExportedProgram:
    """Return what `torch.export` sees of a model that `float32_copy` made; a frozen layer is seen as its operators.

    Inputs and outputs are those that `lower` says.

    Raises:
        ExportError: If torch cannot follow the model.
    """
    flat = FlatCall(model, arguments)
    tensors = input_tensors(arguments if batch is None else batch.several(arguments))
    shapes = open_dimensions(len(tensors), batch)
    with _writing_operators(model), quiet():
        try:
            return torch.export.export(flat, tuple(tensors), dynamic_shapes=shapes, strict=False)
        except Exception as error:  # NOTE: the model's own code runs here under tracing and may raise anything
            raise ExportError(
                f"export: torch.export cannot follow {type(model).__name__}: {first_lines(error)}"
                f"{fixed_batch_hint(batch)}"
            ) from error


def fixed_batch_hint(batch: Batch | None) -> str:
    """Return what else to try if a model with an open batch cannot be exported; nothing if the batch is fixed."""
    return " If its batch size is fixed, pass dynamic_batch=False." if batch is not None else ""


class FlatCall(nn.Module):
    """A model that is called with its input tensors alone, one after the other, and returns its output tensors.

    Whatever else it takes is as in the example; whatever else it returns is left out. So the arguments may have any
    names, and the result may be of any class that `plain_result` knows.
    """

    def __init__(self, model: nn.Module, arguments: Arguments) -> None:
        super().__init__()
        self.add_module(FLAT, model)
        leaves, self.spec = tree_flatten(arguments)
        self.others = [None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return the output tensors for these input tensors."""
        given = iter(tensors)
        args, kwargs = tree_unflatten([next(given) if o is None else o[0] for o in self.others], self.spec)
        return tuple(output_tensors(getattr(self, FLAT)(*args, **kwargs)))


def open_dimensions(count: int, batch: Batch | None) -> Any:
    """Return the dynamic shapes of `count` tensors: open is the first dimension of those that carry the batch."""
    if batch is None:
        return None
    dim = torch.export.Dim(BATCH)
    return (tuple({0: dim} if i in batch.places else None for i in range(count)),)


def _name_inputs(graph: GraphProto, names: list[str]) -> None:
    """Give the inputs their names, and the parameters those that they have in the model."""
    prefix = f"{FLAT}."
    rename(graph, {name: name.removeprefix(prefix) for name in tensor_names(graph) if name.startswith(prefix)})
    rename(graph, dict(zip([i.name for i in graph.input], names, strict=True)))


def rename(graph: GraphProto, names: dict[str, str], reserved: Iterable[str] = ()) -> dict[str, str]:
    """Rename tensors of a graph, in its subgraphs too, and return all names, old to new.

    Another tensor that has such a name already, or a reserved one, gets a number at its end.
    """
    others = [name for name in tensor_names(graph) if name not in names]
    names = names | dict(zip(others, distinct(others, {*names.values(), *reserved}), strict=True))
    for part in graphs(graph):
        for value in (*part.input, *part.output, *part.value_info, *part.initializer):
            value.name = names.get(value.name, value.name)
        for node in part.node:
            for found in (node.input, node.output):
                for i, name in enumerate(found):
                    found[i] = names.get(name, name)
    return names


def tensor_names(graph: GraphProto) -> list[str]:
    """Return the names of all tensors of a graph and its subgraphs, each once."""
    found: dict[str, None] = {}
    for part in graphs(graph):
        found |= dict.fromkeys(value.name for value in (*part.input, *part.initializer))
        found |= dict.fromkeys(name for node in part.node for name in node.output if name)
    return list(found)


def graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """Yield a graph and the graphs inside its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for part in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from graphs(part)


@contextmanager
def _writing_operators(model: nn.Module) -> Iterator[None]:
    """Let every frozen layer call the operators of `frozen_operators`, with its dotted name, during the context."""
    layers = {name: module for name, module in named_layers(model).items() if isinstance(module, FrozenSite)}
    try:
        for name, layer in layers.items():
            layer.qdq, layer.layer_name = True, name
        yield
    finally:
        for layer in layers.values():
            layer.qdq = False


@contextmanager
def quiet(own: bool = False) -> Iterator[None]:
    """Silence what the exporter says about itself: its deprecations, its log, the graph it prints when it fails.

    With `own` the model is the user's, not a copy, and a warning about it is let through.
    """
    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    printed = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(printed):
            for category in (DeprecationWarning, FutureWarning):
                warnings.filterwarnings("ignore", category=category, module=r"(torch|onnxscript|onnx_ir|onnx)\b")
            # torch warns if a forward stores a tensor as an attribute of the model; on a copy that does no harm
            if not own:
                warnings.filterwarnings("ignore", message=r"The tensor attributes? .* assigned during export")
            yield
        sys.stderr.write(printed.getvalue())  # what the model itself printed; after a failure the error says enough
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def first_lines(error: BaseException) -> str:
    """Return the innermost cause of a torch error as one line, without colour codes."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
    lines = [line.strip() for line in text.splitlines() if line.strip()][:3]
    return f"{type(error).__name__}: {' '.join(lines)[:400]}" if lines else type(error).__name__


def named_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return every site, quantized or frozen, and every float layer that could be one, by dotted name.

    A frozen layer with a forward of its own keeps its codes in a child module. The child is listed under the name of
    the layer, so that frozen and quantized layers have the same names.
    """
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if not (isinstance(module, (QuantizedSite, FrozenSite)) or is_site_type(module)):
            continue
        parent, _, last = name.rpartition(".")
        inside = (
            last == CODES and isinstance(module, FrozenSite) and isinstance(model.get_submodule(parent), Rewritten)
        )
        found[parent if inside else name] = module
    return found
