"""The verb `export`: a frozen model as a file for another runtime, which is compared with the model.

An ONNX file holds packed codes and is compared in ONNX Runtime. A `.pt2` file holds a program of `torch.export`, which
is loaded again for the comparison. `export_float` writes a float model as an ONNX file through the same steps, so that
the files of a float and a frozen model can be compared in size and time.
"""

from __future__ import annotations

import functools
import io
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map, tree_structure

from daqconvert.batches import model_device, split_batch, to_device
from daqconvert.deploy.batch_dimension import Batch, open_batch
from daqconvert.deploy.comparing.agreement import FileAgreement, Noise
from daqconvert.deploy.comparing.export_report import ExportReport, ProgramReport
from daqconvert.deploy.comparing.probes import EPILOGUES_KEY, ModuleProbe, epilogues, epilogues_text
from daqconvert.deploy.onnx.expansion import expand
from daqconvert.deploy.onnx.hardware import exact_int8, may_saturate
from daqconvert.deploy.onnx.lowering import BATCH, first_lines, float32_copy, lower, quiet
from daqconvert.deploy.onnx.runtime import PROGRAM, require_packages
from daqconvert.deploy.signature import (
    Arguments,
    example_arguments,
    input_tensors,
    left_out,
    output_names,
    output_tensors,
    plain_result,
    to_float32,
)
from daqconvert.errors import ExportError
from daqconvert.files import replacing
from daqconvert.functional.grid import coding, levels
from daqconvert.functional.integer import LARGEST_WEIGHT
from daqconvert.layers import FrozenSite, QuantizedSite
from daqconvert.models import evaluating

if TYPE_CHECKING:
    from onnx import ModelProto

LARGEST = 2**31  # bytes of an ONNX file
HINT = "Make room, or choose another place."


def export(
    frozen: nn.Module, path: str | Path, example_inputs: Any, *, dynamic_batch: bool | Sequence[str] = True,
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
        dynamic_batch: Whether the batch, the first dimension of the inputs that count samples there, is left open.
            Which inputs do is found by running the model on other rows of the example; side inputs keep their shape.
            The names of these inputs instead of True say so without a trial.
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
        return _export_program(frozen, _free_path(path, overwrite), example_inputs, dynamic_batch, check_batches)
    return _write_onnx(frozen, path, example_inputs, dynamic_batch, check_batches, overwrite)


def export_float(
    model: nn.Module, path: str | Path, example_inputs: Any, *, dynamic_batch: bool | Sequence[str] = True,
    overwrite: bool = False,
) -> ExportReport:  # fmt: skip
    """Write a float model as an ONNX file in float32, and compare the two in ONNX Runtime.

    Args:
        model: A model without quantized layers; it is not changed, and exported in evaluation mode.
        path: The file to write.
        example_inputs: A tensor, a tuple of positional or a dict of keyword arguments.
        dynamic_batch: Whether the batch is left open, or the names of the inputs that carry it, as in `export`.
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
    model: nn.Module, path: str | Path, example_inputs: Any, dynamic_batch: bool | Sequence[str] = True,
    check_batches: Iterable[Any] | None = None, overwrite: bool = False,
) -> ExportReport:  # fmt: skip
    """Write a frozen or float model as an ONNX file, after comparing the file with the model."""
    place = _free_path(path, overwrite)
    require_packages()
    arguments = example_arguments(example_inputs)
    _check_size(model)
    twin = float32_copy(model)
    result = _result(twin, arguments)
    batch = open_batch(twin, arguments, dynamic_batch)
    proto = expand(lower(twin, arguments, batch), output_names(result))
    if epilogues(model):
        entry = proto.metadata_props.add()
        entry.key, entry.value = EPILOGUES_KEY, epilogues_text(model)
    content = _serialize(proto)
    agreement = FileAgreement(ModuleProbe(twin), content)
    agreement.add(*arguments)
    for example in check_batches if check_batches is not None else ():
        args, kwargs, _ = split_batch(example, twin)
        agreement.add(*to_float32((args, kwargs)))
    if batch is not None:
        agreement.add_other(*batch.other(arguments))
    notes = _notes(model) + _notes_on_ends(twin, arguments, batch, result)
    outputs = agreement.outputs
    report = ExportReport(
        str(place), len(content), agreement.layers(), outputs.samples, outputs.largest, outputs.sqnr,
        agreement.outputs_same.sqnr, outputs.class_agreement, tuple(notes), tuple(agreement.other_problems()),
    )  # fmt: skip
    with replacing(place, ExportError, HINT) as temporary:
        temporary.write_bytes(content)
    _warn_of(report)
    return report


def _warn_of(report: ExportReport | ProgramReport) -> None:
    if not report.agrees:
        warnings.warn(f"{report.path} does not agree with the model: {'; '.join(report.problems())}", stacklevel=4)


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


def _result(model: nn.Module, arguments: Arguments) -> Any:
    """Run the model once and return its result; raises `ExportError` if it cannot run, or returns no tensor."""
    try:
        with torch.no_grad():
            result = model(*arguments[0], **arguments[1])
    except Exception as error:  # NOTE: the model's own code may raise anything
        raise ExportError(
            f"export: {type(model).__name__} cannot run on example_inputs: {type(error).__name__}: {str(error)[:300]}"
        ) from error
    if not output_tensors(result):
        raise ExportError(
            f"export: {type(model).__name__} returns no tensor: expected tensors, or tuples, lists, dicts or "
            f"dataclasses of them, found {type(result).__name__}."
        )
    return result


def _notes_on_ends(model: nn.Module, arguments: Arguments, batch: Batch | None, result: Any) -> list[str]:
    """Return what a user of the file has to know about its inputs and outputs."""
    notes = [] if batch is None else batch.notes(model, arguments)
    others = left_out(result)
    return [*notes, f"not in the file, which holds tensors alone: {', '.join(others)}"] if others else notes


def _check_size(model: nn.Module) -> None:
    """Raise `ExportError`, before anything is copied, if the tensors of a model do not fit into an ONNX file."""
    sites = [m for m in model.modules() if isinstance(m, FrozenSite)]
    packed = {id(m._buffers["weight_codes"]): m.settings.w_bits for m in sites if "weight_codes" in m._buffers}
    size = 0
    for tensor in (*model.parameters(), *model.buffers()):
        bits = packed.get(id(tensor)) or 8 * (4 if tensor.is_floating_point() else tensor.element_size())
        size += tensor.numel() * bits // 8
    if size >= LARGEST:
        raise ExportError(
            f"export: {type(model).__name__} has {size / 1e9:.2f} GB of codes and float tensors; an ONNX file ends "
            "at 2 GB. Export it to a name that ends in .pt2, or give its largest layers fewer bits; what is left in "
            "float takes 4 bytes a number."
        )


def _serialize(proto: ModelProto) -> bytes:
    """Return the file's bytes; raises `ExportError` if ONNX's checker or shape inference refuses them."""
    import onnx

    try:
        content = proto.SerializeToString()
        onnx.checker.check_model(content, full_check=True)
        onnx.shape_inference.infer_shapes(content, strict_mode=True, data_prop=True)
    except Exception as error:  # NOTE: protobuf, the checker and shape inference each raise a class of their own
        what = "an ONNX file ends at 2 GB" if proto.ByteSize() >= LARGEST else str(error).strip()[:400]
        raise ExportError(f"export: the graph is not valid ONNX: {what}") from error
    return content


def _notes(model: nn.Module) -> list[str]:
    """Return what else a user of the file has to know, beside how well it agrees, a sentence each."""
    notes = []
    sites = [m for m in model.modules() if isinstance(m, FrozenSite)]
    transposed = [m.layer_name for m in sites if isinstance(m, nn.modules.conv._ConvTransposeNd)]
    if transposed:
        count = f"{len(transposed)} transposed convolution{'s' if len(transposed) > 1 else ''}"
        named = transposed[0] + (", ..." if len(transposed) > 1 else "")
        notes.append(f"{count} ({named}): packed, but computed in float: there is no integer kernel")
    wide = [m for m in sites if _may_saturate(m)] if exact_int8() is False else []
    if wide:
        notes.append(
            f"{len(wide)} layer{'s' if len(wide) > 1 else ''} on a processor without VNNI: its integer kernels add "
            "pairs of products in 16 bits, and sums beyond them are wrong, "
            f"{wide[0].layer_name or '(root)'} first. Quantize the inputs of these layers to 7 bits (a_bits = 7)."
        )
    return notes + _dtype_notes(model)


def _may_saturate(site: FrozenSite) -> bool:
    """Whether two products of a layer may exceed 16 bits in ONNX Runtime's integer kernels, at any number of bits.

    Integer layers store their weights times `127 // n`, so that few bits are as large as eight.
    """
    bits, inputs = site.settings.w_bits, site.settings.a_bits
    if bits is None or inputs is None or "weight_codes" not in site._buffers:
        return False
    grid = site.settings.grid
    if levels(bits, grid) > LARGEST_WEIGHT or not (site.is_integer or site.output_dims == 0):
        return False  # it is computed in float
    largest = round(-coding(bits, grid)[1])
    return may_saturate(2**inputs - 1, largest * (LARGEST_WEIGHT // largest) if site.is_integer else largest)


def _dtype_notes(model: nn.Module) -> list[str]:
    dtypes = {p.dtype for p in (*model.parameters(), *model.buffers()) if p.is_floating_point()}
    dtypes |= {module.dtype for module in model.modules() if isinstance(module, FrozenSite)}
    other = sorted(str(dtype).removeprefix("torch.") for dtype in dtypes - {torch.float32})
    return [f"{', '.join(other)} was exported, and compared, in float32"] if other else []


def _export_program(
    model: nn.Module, place: Path, example_inputs: Any, dynamic_batch: bool | Sequence[str],
    check_batches: Iterable[Any] | None,
) -> ProgramReport:  # fmt: skip
    """Write a model as a program of torch.export, in its own dtype and on its own device.

    The program is loaded again and compared with the model before the file is put in place: on the example inputs, at
    another batch size, and on `check_batches`.

    Raises:
        ExportError: If torch cannot follow the model, or cannot load the program again.
    """
    arguments, device = example_arguments(example_inputs, move=False), model_device(model)
    with evaluating(model):
        result = _result(model, arguments)
        batch = open_batch(model, arguments, dynamic_batch)
        with _storable(model, result) as notes:
            content = _program(model, arguments, batch)
        again = _loaded(model, content)
        noise, samples = Noise(), 0
        for args, kwargs in [arguments] if batch is None else [arguments, batch.other(arguments)]:
            samples = max(samples, _compare(noise, model, again, args, kwargs))
        for example in check_batches if check_batches is not None else ():
            args, kwargs, _ = split_batch(example, model)
            samples += _compare(noise, model, again, to_device(args, device), to_device(kwargs, device))
        if batch is not None:
            notes += batch.notes(model, arguments)
    with replacing(place, ExportError, HINT) as temporary:
        temporary.write_bytes(content)
    report = ProgramReport(str(place), len(content), samples, noise.largest, tuple(notes))
    _warn_of(report)
    return report


def _program(model: nn.Module, arguments: Arguments, batch: Batch | None) -> bytes:
    """Return the file of a model as torch.export follows it, with an open batch unless `batch` is None."""
    hint = " If its batch size is fixed, pass dynamic_batch=False." if batch is not None else ""
    args, kwargs = arguments if batch is None else batch.several(arguments)
    odd = [key for key in kwargs if not key.isidentifier()]
    if odd:
        raise ExportError(f"export: a program of torch.export has no argument {odd[0]!r}: it is no name in Python.")
    shapes = None
    if batch is not None:
        dim, collection = torch.export.Dim(BATCH), torch.export.ShapesCollection()
        tensors = input_tensors((args, kwargs))
        for place in batch.places:
            collection[tensors[place]] = {0: dim}
        shapes = collection.dynamic_shapes(model, args, kwargs)
    try:
        with torch.no_grad(), quiet(own=True):
            program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
            stream = io.BytesIO()
            torch.export.save(program, stream)
    except Exception as error:  # NOTE: the model's own code runs here under tracing and may raise anything
        raise ExportError(
            f"export: torch.export cannot follow {type(model).__name__}: {first_lines(error)}{hint}"
        ) from error
    return stream.getvalue()


def _loaded(model: nn.Module, content: bytes) -> nn.Module:
    try:
        with quiet():
            return torch.export.load(io.BytesIO(content)).module()
    except Exception as error:  # NOTE: torch raises many kinds, some of them assertions
        raise ExportError(
            f"export: torch.export wrote {type(model).__name__} and cannot load it again: {first_lines(error)}"
        ) from error


def _compare(noise: Noise, model: nn.Module, again: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Add how a reloaded program differs from its model on these arguments; return the number of samples.

    Raises:
        ExportError: If the program cannot run on them, or returns tensors of other shapes.
    """
    with torch.no_grad():
        wanted = output_tensors(model(*args, **kwargs))
        try:
            found = output_tensors(again(*args, **kwargs))
        except Exception as error:  # NOTE: guards are assertions, operators raise errors of their own
            shapes = ", ".join(str(tuple(t.shape)) for t in input_tensors((args, kwargs)))
            raise ExportError(
                f"export: the program of {type(model).__name__} cannot run on inputs of shapes {shapes}: "
                f"{first_lines(error)}"
            ) from error
    noise.add("output", wanted, found)
    return max((t.shape[0] for t in wanted if t.dim()), default=1)


@contextmanager
def _storable(model: nn.Module, result: Any) -> Iterator[list[str]]:
    """Let a model return what a program can hold while the context lasts: dicts for classes, None for texts.

    Yields:
        What a user of the program has to know about that, a sentence each.
    """

    def plain(value: Any) -> Any:
        return tree_map(lambda leaf: None if isinstance(leaf, str) else leaf, plain_result(value))

    notes: list[str] = []
    if tree_structure(plain_result(result)) != tree_structure(result):
        notes.append("dataclasses, named tuples and the like are dicts in what the program returns")
    if any(isinstance(leaf, str) for leaf in tree_leaves(plain_result(result))):
        notes.append("a program holds no texts: they are None in what it returns")
    if not notes:
        yield notes
        return
    forward, own = model.forward, "forward" in vars(model)

    @functools.wraps(forward)
    def returning_plain(*args: Any, **kwargs: Any) -> Any:
        return plain(forward(*args, **kwargs))

    model.forward = returning_plain
    try:
        yield notes
    finally:
        if own:
            model.forward = forward
        else:
            del model.forward
