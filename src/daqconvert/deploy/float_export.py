"""A float model as an ONNX file, through the same steps: what a frozen one is compared with in size and time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from daqconvert.deploy.export import write_onnx
from daqconvert.deploy.reports import ExportReport
from daqconvert.errors import ExportError
from daqconvert.layers import FrozenSite, QuantizedSite


def export_float(
    model: nn.Module, path: str | Path, example_inputs: Any, *, dynamic_batch: bool = True, overwrite: bool = False
) -> ExportReport:
    """Write a float model as an ONNX file in float32, and compare the two in ONNX Runtime.

    Args:
        model: A model without quantized layers; not changed, exported in evaluation mode.
        path: The file to write.
        example_inputs: A tensor, a tuple of positional or a dict of keyword arguments.
        dynamic_batch: Whether the first dimension of the inputs is left open.
        overwrite: Whether an existing file may be replaced.

    Returns:
        Agreement of the outputs; it has no layers.

    Raises:
        ExportError: As `export` does; also if the model has quantized or frozen layers.
    """
    for name, module in model.named_modules():
        if isinstance(module, (QuantizedSite, FrozenSite)):
            raise ExportError(f"export_float: {name or 'the model'} is quantized; expected the original float model.")
    return write_onnx(model, path, example_inputs, dynamic_batch, None, overwrite)
