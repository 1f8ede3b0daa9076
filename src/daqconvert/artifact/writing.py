"""The verb `save`: a frozen model as an artifact, a directory of packed safetensors and JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from daqconvert.artifact.builders import check_source
from daqconvert.artifact.manifest import (
    FLOATS,
    FORMAT,
    MANIFEST,
    TENSORS,
    VERSION,
    Manifest,
    TensorEntry,
    largest_size,
    parse_manifest,
)
from daqconvert.artifact.reading import try_source
from daqconvert.artifact.skeleton import forward_hashes
from daqconvert.artifact.tensors import collect, sha256, write_tensors
from daqconvert.errors import ArtifactError, FrozenError
from daqconvert.files import replacing_directory
from daqconvert.freezing import is_frozen
from daqconvert.kept_plan import reconcile_and_warn
from daqconvert.layers.frozen_site import FrozenSite

HINT = "Free some space or choose another path."


def save(
    frozen: nn.Module,
    path: str | Path,
    *,
    source: str | None = None,
    source_kwargs: dict[str, Any] | None = None,
    classes: Sequence[str] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a frozen model as a directory: `model.safetensors` with packed codes, `daqconvert.json` with the plan.

    `N` codes of `b` bits take `b * ceil(N / 8)` bytes; every other parameter and buffer keeps its dtype. A tensor that
    has two names is stored once. Tensors are packed and written one after the other, without a second copy of the
    model. The directory appears whole or not at all, and the same model gives the same bytes.

    Args:
        frozen: A model from `freeze`.
        path: The directory to write.
        source: `timm:NAME` or `torchvision:NAME`, from which `load` rebuilds the model; without it `load` needs a
            skeleton.
        source_kwargs: Arguments with which the source builds the model, such as `{"num_classes": 10}`: numbers, texts,
            booleans, and lists of these.
        classes: Names of the model's classes, in the order of its outputs, so that other data can be mapped to them.
        overwrite: Whether an artifact at `path` may be replaced.

    Returns:
        The directory.

    Raises:
        FrozenError: If the model is not frozen.
        ArtifactError: If `path` is in use or cannot be written, a tensor cannot be stored, or `source` does not build
            this model.

    Example:
        >>> import tempfile, daqconvert as dq
        >>> qmodel = dq.quantize(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), w_bits=4, a_bits=4)
        >>> report = dq.calibrate(qmodel, [torch.randn(8, 4)])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sorted(p.name for p in dq.save(dq.freeze(qmodel), folder + "/artifact").iterdir())
        ['daqconvert.json', 'model.safetensors']
    """
    if not is_frozen(frozen):
        raise FrozenError(f"save: {type(frozen).__name__} is not frozen. Call daqconvert.freeze(qmodel) first.")
    directory = _free_directory(path, overwrite)
    entries, state = collect(frozen)
    draft = _draft(frozen, entries, source, source_kwargs or {})
    draft = dataclasses.replace(draft, classes=tuple(map(str, classes)) if classes else None)
    try:
        try_source(draft, "save")
    except ArtifactError as error:
        raise ArtifactError(f"{error} Give the source and source_kwargs that build this model, or neither.") from error
    with replacing_directory(directory, ArtifactError, HINT) as temporary:
        file = temporary / TENSORS
        write_tensors(file, entries, state)
        manifest = dataclasses.replace(draft, bytes=file.stat().st_size, sha256=sha256(file))
        content = manifest.to_json().encode()
        parse_manifest(content, str(directory / MANIFEST))  # nothing is written that could not be read
        (temporary / MANIFEST).write_bytes(content)
    return directory


def _free_directory(path: str | Path, overwrite: bool) -> Path:
    """Return the directory to write, after making sure that nothing but an artifact can be lost there."""
    directory = Path(path)
    if "\0" in str(directory):
        raise ArtifactError(f"{str(directory)!r}: no path holds a null character. Choose another path.")
    try:
        if not directory.is_dir():
            if directory.exists():
                raise ArtifactError(f"{directory}: is a file; an artifact is a directory. Choose another path.")
            return directory
        if directory.resolve() in (Path.cwd(), *Path.cwd().parents):
            raise ArtifactError(f"{directory}: is the current directory or one above it. Name a directory to make.")
        found = sorted(entry.name for entry in directory.iterdir())
    except OSError as error:
        raise ArtifactError(f"{str(directory)!r}: cannot be used ({error}). Choose another path.") from None
    foreign = [name for name in found if name not in (MANIFEST, TENSORS)]
    if foreign:
        what = "holds other files too" if MANIFEST in found else "is no artifact"
        raise ArtifactError(
            f"{directory}: exists and {what} ({foreign[0]!r}), which would be lost. Choose another path."
        )
    if found and not overwrite:
        raise ArtifactError(f"{directory}: exists. Pass overwrite=True to replace it, or choose another path.")
    return directory


def _draft(
    frozen: nn.Module, entries: Mapping[str, TensorEntry], source: str | None, kwargs: Mapping[str, Any]
) -> Manifest:
    """Return the manifest before the tensor file is written: without the size and hash of that file."""
    try:
        plain: dict[str, Any] = json.loads(json.dumps(kwargs))
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"source_kwargs: expected numbers, texts, booleans and lists ({error}).") from None
    check_source(source, plain, largest_size(entries))
    found = reconcile_and_warn(frozen, "save")
    found.require_known(frozen, "save")
    plan = found.plan
    return Manifest(
        format=FORMAT,
        version=VERSION,
        daqconvert=_own_version(),
        model=plan.model,  # not the root's own class, which may be one that was made for a rewritten forward
        source=source,
        source_kwargs=plain,
        dtype=_model_dtype(frozen),
        bytes=0,
        sha256="0" * 64,
        forwards=forward_hashes(frozen),
        tensors=dict(entries),
        plan=plan,
    )


def _model_dtype(frozen: nn.Module) -> str:
    """Return the dtype of the frozen layers' operands, which must be the same in all of them."""
    layers = {name: module for name, module in frozen.named_modules() if isinstance(module, FrozenSite)}
    dtypes = {str(layer.dtype).removeprefix("torch."): name for name, layer in layers.items()}
    if len(dtypes) > 1:
        found = " and ".join(f"{name or '(root)'} in {dtype}" for dtype, name in sorted(dtypes.items()))
        raise ArtifactError(
            f"an artifact is of one dtype, found {found}. Call .float() or .half() on the frozen model."
        )
    dtype = next(iter(dtypes))
    if dtype not in FLOATS:
        raise ArtifactError(f"{dtypes[dtype]}: expected one of {', '.join(FLOATS)}, found {dtype}.")
    return dtype


def _own_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("daqconvert")
    except PackageNotFoundError:
        return "source"
