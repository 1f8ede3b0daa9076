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
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from daqconvert.deploy.onnx.frozen_operators import translations
from daqconvert.deploy.onnx.runtime import require_packages
from daqconvert.errors import ExportError
from daqconvert.graph.rewrite import CODES, Rewritten
from daqconvert.layers import FrozenSite, QuantizedSite, is_site_type

if TYPE_CHECKING:
    from onnx import ModelProto


OPSET = 21
BATCH = "batch"
LOGGERS = ("torch.onnx", "torch.export", "torch.fx.experimental.symbolic_shapes", "onnxscript", "onnx_ir")
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def example_arguments(example_inputs: Any, move: bool = True) -> Arguments:
    """Return example inputs as positional and keyword arguments, on the CPU in float32 unless `move` is False.

    Raises:
        ExportError: Unless they are a tensor, a tuple or list of positional arguments or a dict of keyword arguments,
            and hold a tensor.
    """
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(example_inputs, Tensor):
        args = (example_inputs,)
    elif isinstance(example_inputs, dict):
        kwargs = dict(example_inputs)
    elif isinstance(example_inputs, (tuple, list)):
        args = tuple(example_inputs)
    if not any(isinstance(leaf, Tensor) for leaf in tree_leaves((args, kwargs))):
        raise ExportError(
            "export: example_inputs: expected a tensor, a tuple of positional arguments, or a dict of keyword "
            f"arguments with at least one tensor; found {type(example_inputs).__name__}."
        )
    return to_float32((args, kwargs)) if move else (args, kwargs)


def to_float32(value: Any) -> Any:
    """Move every tensor of a nested structure to the CPU, floating-point ones as float32."""
    return tree_map_only(Tensor, lambda t: t.detach().cpu().float() if t.is_floating_point() else t.cpu(), value)


def float32_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a model on the CPU, in float32, in evaluation mode."""
    twin = copy.deepcopy(model).cpu().float()
    for module in twin.modules():
        module.training = False
    return twin


def lower(model: nn.Module, arguments: Arguments, dynamic_batch: bool) -> ModelProto:
    """Return the ONNX graph of a model that `float32_copy` made; frozen layers become placeholders.

    With `dynamic_batch` the first dimension of the inputs is left open.

    Raises:
        ExportError: If torch cannot export the model; the message says at which step and why.
    """
    require_packages()
    what = type(model).__name__
    hint = " If its batch size is fixed, pass dynamic_batch=False." if dynamic_batch else ""
    if dynamic_batch:
        arguments = repeated(arguments)
    with _writing_operators(model), quiet():
        try:
            program = torch.export.export(
                model,
                *arguments,
                dynamic_shapes=open_batch(model, arguments) if dynamic_batch else None,
                strict=False,
            )
        except Exception as error:  # NOTE: the model's own code runs here under tracing and may raise anything
            raise ExportError(f"export: torch.export cannot follow {what}: {first_lines(error)}{hint}") from error
        try:
            result = torch.onnx.export(
                program, dynamo=True, opset_version=OPSET, verbose=False, custom_translation_table=translations()
            )
            assert result is not None
            return result.model_proto
        except Exception as error:  # NOTE: the exporter wraps any exception of a translation in its own
            raise ExportError(f"export: torch.onnx cannot write {what}: {first_lines(error)}{hint}") from error


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


def repeated(arguments: Arguments) -> Arguments:
    """Return arguments with a batch of one repeated, because torch.export treats a size of 1 as a constant."""
    return tree_map_only(Tensor, lambda t: torch.cat([t, t]) if t.dim() and t.shape[0] == 1 else t, arguments)


def open_batch(model: nn.Module, arguments: Arguments) -> Any:
    """Return torch.export's description of a first dimension that is open, the same one in every input."""
    tensors = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]
    size = next((t.shape[0] for t in tensors if t.dim()), None)
    batch = torch.export.Dim(BATCH)
    shapes = torch.export.ShapesCollection()
    for tensor in tensors:
        if tensor.dim() and tensor.shape[0] == size:
            shapes[tensor] = {0: batch}
    return shapes.dynamic_shapes(model, *arguments)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what the exporter says about itself: its deprecations, its log, the graph it prints when it fails."""
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
