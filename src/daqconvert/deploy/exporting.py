"""The verb `export`: a frozen model as a file for another runtime, which is compared with the model.

An ONNX file holds packed codes and is compared in ONNX Runtime. A `.pt2` file holds a program of `torch.export`, which
is loaded again for the comparison. `export_float` writes a float model as an ONNX file through the same steps, so that
the files of a float and a frozen model can be compared in size and time.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves

from daqconvert.batches import split_batch
from daqconvert.deploy.comparing.agreement import FileAgreement
from daqconvert.deploy.comparing.export_report import ExportReport, ProgramReport
from daqconvert.deploy.comparing.probes import ModuleProbe
from daqconvert.deploy.onnx.expansion import expand
from daqconvert.deploy.onnx.hardware import exact_int8
from daqconvert.deploy.onnx.lowering import (
    Arguments,
    example_arguments,
    first_lines,
    float32_copy,
    lower,
    open_batch,
    quiet,
    repeated,
    to_float32,
)
from daqconvert.deploy.onnx.runtime import require_packages
from daqconvert.errors import ExportError
from daqconvert.files import replacing
from daqconvert.layers import FrozenSite, QuantizedSite

if TYPE_CHECKING:
    from onnx import ModelProto

PROGRAM = ".pt2"  # a path with this ending gets a program of torch.export, any other an ONNX file
HINT = "Make room, or choose another place."


def export(
    frozen: nn.Module, path: str | Path, example_inputs: Any, *, dynamic_batch: bool = True,
    check_batches: Iterable[Any] | None = None, overwrite: bool = False,
) -> ExportReport | ProgramReport:  # fmt: skip
    """Write a frozen model as an ONNX file with packed weights, and compare the two in ONNX Runtime.

    The file holds `w_bits` bits per weight, and standard operators (opset 21) that unpack them once, when ONNX Runtime
    loads the file; batch norm, biases and scales stay float32. Outputs, classes and the codes of every layer are
    compared on the example inputs and on `check_batches`, with the CPU provider and the default options. For a path
    that ends in `.pt2`, a program of `torch.export` is written instead; it is loaded again and compared with the
    model, element by element.

    Args:
        frozen: A model from `freeze` or `load`; it is not changed. A float16 or bfloat16 model is exported in float32.
        path: The file to write; missing directories are created.
        example_inputs: A tensor, a tuple of positional or a dict of keyword arguments.
        dynamic_batch: Whether the first dimension of the inputs is left open.
        check_batches: Further batches to compare on, in the forms that `calibrate` takes; targets are not used.
        overwrite: Whether an existing file may be replaced.

    Returns:
        How well each layer and the outputs agree; `print` it. `report.agrees` is the verdict. A file that does not
        agree is still written, with a warning.

    Raises:
        ExportError: If the model is not frozen, cannot be exported or written, or a package is missing. In that case
            no file is left behind, and an existing file is unchanged.

    Example:
        >>> import tempfile
        >>> model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> qmodel, x = dq.quantize(model, w_bits=4, a_bits=4), torch.randn(16, 8)
        >>> calibrated = dq.calibrate(qmodel, [x])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = dq.export(dq.freeze(qmodel), f"{folder}/model.onnx", x)
        >>> report.agrees
        True
    """
    _require_frozen(frozen)
    if Path(path).suffix == PROGRAM:
        return _export_program(frozen, _free_path(path, overwrite), example_inputs, dynamic_batch)
    return _write_onnx(frozen, path, example_inputs, dynamic_batch, check_batches, overwrite)


def export_float(
    model: nn.Module, path: str | Path, example_inputs: Any, *, dynamic_batch: bool = True, overwrite: bool = False
) -> ExportReport:
    """Write a float model as an ONNX file in float32, and compare the two in ONNX Runtime.

    Args:
        model: A model without quantized layers; it is not changed, and exported in evaluation mode.
        path: The file to write.
        example_inputs: A tensor, a tuple of positional or a dict of keyword arguments.
        dynamic_batch: Whether the first dimension of the inputs is left open.
        overwrite: Whether an existing file may be replaced.

    Returns:
        How well the outputs agree; the report has no layers.

    Raises:
        ExportError: If the model has quantized or frozen layers, cannot be exported or written, or a package is
            missing.
    """
    for name, module in model.named_modules():
        if isinstance(module, (QuantizedSite, FrozenSite)):
            raise ExportError(f"export_float: {name or 'the model'} is quantized; expected the original float model.")
    return _write_onnx(model, path, example_inputs, dynamic_batch, None, overwrite)


def _write_onnx(
    model: nn.Module, path: str | Path, example_inputs: Any, dynamic_batch: bool = True,
    check_batches: Iterable[Any] | None = None, overwrite: bool = False,
) -> ExportReport:  # fmt: skip
    """Write a frozen or float model as an ONNX file, after comparing the file with the model."""
    place = _free_path(path, overwrite)
    require_packages()
    arguments = example_arguments(example_inputs)
    twin = float32_copy(model)
    names = _output_names(twin, arguments)
    content = _serialize(expand(lower(twin, arguments, dynamic_batch), names))
    agreement = FileAgreement(ModuleProbe(twin), content)
    agreement.add(*arguments)
    for batch in check_batches if check_batches is not None else ():
        args, kwargs, _ = split_batch(batch)
        agreement.add(*to_float32((args, kwargs)))
    outputs = agreement.outputs
    report = ExportReport(
        str(place), len(content), agreement.layers(), outputs.samples, outputs.largest, outputs.sqnr,
        agreement.outputs_same.sqnr, outputs.class_agreement, tuple(_notes(model)),
    )  # fmt: skip
    with replacing(place, ExportError, HINT) as temporary:
        temporary.write_bytes(content)
    if not report.agrees:
        warnings.warn(f"{place} does not agree with the model: {'; '.join(report.problems())}", stacklevel=3)
    return report


def _free_path(path: str | Path, overwrite: bool) -> Path:
    """Return where to write, or raise `ExportError` if no file can or may be written there."""
    place = Path(path)
    if place.is_dir():
        raise ExportError(f"export: {place} is a directory; expected the name of a file, as {place / 'model.onnx'}.")
    parent = next(folder for folder in place.absolute().parents if folder.exists())
    if not parent.is_dir():
        raise ExportError(f"export: {place} cannot be written: {parent} is a file, not a directory.")
    if place.exists() and not overwrite:
        raise ExportError(f"export: {place} exists. Pass overwrite=True to replace it, or another name.")
    return place


def _require_frozen(model: nn.Module) -> None:
    """Raise `ExportError` unless a model has frozen layers and no quantized ones."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedSite):
            raise ExportError(
                f"export: {name or 'the model'} is quantized but not frozen. "
                "Call frozen = daqconvert.freeze(model) first, then export that."
            )
    if not any(isinstance(module, FrozenSite) for module in model.modules()):
        raise ExportError(
            f"export: {type(model).__name__} has no frozen layer. Quantize and calibrate it, then call "
            "daqconvert.freeze(qmodel) and export what that returns."
        )


def _output_names(model: nn.Module, arguments: Arguments) -> list[str]:
    """Run the model once and name its output tensors: a single one `output`, several by their places in the result."""
    try:
        with torch.no_grad():
            result = model(*arguments[0], **arguments[1])
    except Exception as error:  # NOTE: the model's own code may raise anything
        raise ExportError(
            f"export: {type(model).__name__} cannot run on example_inputs: {type(error).__name__}: {str(error)[:300]}"
        ) from error
    leaves = [(place, leaf) for place, leaf in tree_flatten_with_path(result)[0] if isinstance(leaf, Tensor)]
    if len(leaves) == 1:
        return ["output"]
    words = [
        keystr(place).replace("']", "").replace("['", "_").replace("[", "_").replace("]", "") for place, _ in leaves
    ]
    return [f"output{word.replace('.', '_')}" for word in words]


def _serialize(proto: ModelProto) -> bytes:
    """Return the file's bytes; raises `ExportError` if ONNX's checker or shape inference refuses them."""
    import onnx

    try:
        content = proto.SerializeToString()
        onnx.checker.check_model(content, full_check=True)
        onnx.shape_inference.infer_shapes(content, strict_mode=True, data_prop=True)
    except Exception as error:  # NOTE: protobuf, the checker and shape inference each raise a class of their own
        what = "an ONNX file ends at 2 GB" if proto.ByteSize() >= 2**31 else str(error).strip()[:400]
        raise ExportError(f"export: the graph is not valid ONNX: {what}") from error
    return content


def _notes(model: nn.Module) -> list[str]:
    """Return what else a user of the file has to know, beside how well it agrees, a sentence each."""
    notes = []
    sites = [m for m in model.modules() if isinstance(m, FrozenSite)]
    transposed = [m.layer_name for m in sites if isinstance(m, nn.modules.conv._ConvTransposeNd)]
    if transposed:
        count = f"{len(transposed)} transposed convolution{'s' if len(transposed) > 1 else ''}"
        notes.append(f"{count} ({transposed[0]}, ...): packed, but computed in float: there is no integer kernel")
    wide = [m for m in sites if (m.settings.w_bits or 0) == 8 and m.settings.a_bits == 8]
    if wide and exact_int8() is False:
        notes.append(
            f"{len(wide)} layers of W8A8 on a processor without VNNI: its integer kernels add pairs of products in 16 "
            f"bits, and sums beyond them are wrong, {wide[0].layer_name} first. Use 7 bits for the weights there."
        )
    return notes + _dtype_notes(model)


def _dtype_notes(model: nn.Module) -> list[str]:
    dtypes = {p.dtype for p in (*model.parameters(), *model.buffers()) if p.is_floating_point()}
    dtypes |= {module.dtype for module in model.modules() if isinstance(module, FrozenSite)}
    other = sorted(str(dtype).removeprefix("torch.") for dtype in dtypes - {torch.float32})
    return [f"{', '.join(other)} was exported, and compared, in float32"] if other else []


def _export_program(model: nn.Module, place: Path, example_inputs: Any, dynamic_batch: bool) -> ProgramReport:
    """Write a model as a program of torch.export, in its own dtype and on its own device.

    The program is loaded again and compared with the model on the example inputs before the file is put in place.

    Raises:
        ExportError: If torch cannot follow the model, or cannot load the program again.
    """
    arguments = example_arguments(example_inputs, move=False)
    args, kwargs = repeated(arguments) if dynamic_batch else arguments
    try:
        with torch.no_grad(), quiet():
            shapes = open_batch(model, (args, kwargs)) if dynamic_batch else None
            program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
            stream = io.BytesIO()
            torch.export.save(program, stream)
            stream.seek(0)
            again = torch.export.load(stream).module()
            wanted, found = (tree_leaves(each(*args, **kwargs)) for each in (model, again))
    except Exception as error:  # NOTE: the model's own code runs here under tracing and may raise anything
        hint = " If its batch size is fixed, pass dynamic_batch=False." if dynamic_batch else ""
        raise ExportError(
            f"export: torch.export cannot follow {type(model).__name__}: {first_lines(error)}{hint}"
        ) from error
    pairs = [(a, b) for a, b in zip(wanted, found, strict=True) if isinstance(a, Tensor)]
    with replacing(place, ExportError, HINT) as temporary:
        temporary.write_bytes(stream.getvalue())
    largest = max((float((a.double() - b.double()).abs().max()) for a, b in pairs if a.numel()), default=0.0)
    samples = max((a.shape[0] for a, _ in pairs if a.dim()), default=1)
    return ProgramReport(str(place), len(stream.getvalue()), samples, largest)
