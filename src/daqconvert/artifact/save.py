"""The verb `save`: a frozen model as packed safetensors and JSON."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from daqconvert.artifact.manifest import FORMAT, MANIFEST, TENSORS, VERSION, Manifest, TensorEntry
from daqconvert.convert import current_plan
from daqconvert.errors import ArtifactError, FrozenError
from daqconvert.files import replacing_directory
from daqconvert.freezing import is_frozen
from daqconvert.functional.packing import pack
from daqconvert.layers.frozen import FrozenLayer
from daqconvert.sources import parse_source

HINT = "Free some space or choose another path."


def save(
    frozen: nn.Module,
    path: str | Path,
    *,
    source: str | None = None,
    source_kwargs: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a frozen model as a directory: `model.safetensors` with packed codes, `daqconvert.json` with the plan.

    Codes of `b` bits take `b * ceil(N / 8)` bytes; every other parameter and buffer keeps its dtype. Tensors that two
    names share are stored once. The directory appears whole or not at all.

    Args:
        frozen: From `freeze`.
        path: The directory to write.
        source: `timm:NAME` or `torchvision:NAME`, from which `load` rebuilds the model; None: `load` needs a skeleton.
        source_kwargs: Arguments of the builder, as `{"num_classes": 10}`; numbers, texts, booleans, lists of such.
        overwrite: Replace an artifact at `path`.

    Returns:
        The directory.

    Raises:
        FrozenError: If the model is not frozen.
        ArtifactError: If `path` is in use or cannot be written, or `source` cannot be stored.

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
    target = Path(path)
    _check_target(target, overwrite)
    kwargs = _check_source(source, source_kwargs or {})
    entries, stored = _collect(frozen)
    dtypes = Counter(e.dtype for k, e in entries.items() if e.dtype in ("float32", "float16", "bfloat16", "float64"))
    with replacing_directory(target, ArtifactError, HINT) as temporary:
        file = temporary / TENSORS
        save_file(stored, str(file))
        manifest = Manifest(
            format=FORMAT,
            version=VERSION,
            daqconvert=_own_version(),
            model=type(frozen).__name__,
            source=source,
            source_kwargs=kwargs,
            dtype=_model_dtype(frozen, dtypes),
            bytes=file.stat().st_size,
            sha256=sha256(file),
            tensors=entries,
            plan=current_plan(frozen),
        )
        (temporary / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return target


def sha256(file: Path) -> str:
    """Return the SHA-256 of a file, read in pieces."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _check_target(target: Path, overwrite: bool) -> None:
    if target.is_file():
        raise ArtifactError(f"{target}: is a file; an artifact is a directory. Choose another path.")
    if target.is_dir() and any(target.iterdir()):
        if not (target / MANIFEST).is_file():
            raise ArtifactError(f"{target}: exists, is not empty and is no artifact. Choose another path.")
        if not overwrite:
            raise ArtifactError(f"{target}: exists. Pass overwrite=True to replace it, or choose another path.")


def _check_source(source: str | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    if source is None:
        if kwargs:
            raise ArtifactError("source_kwargs: have no effect without source. Pass source='timm:NAME' as well.")
        return {}
    if not parse_source(source).is_trusted_name:
        raise ArtifactError(
            f"source {source!r}: an artifact names only timm:NAME or torchvision:NAME, which load can rebuild without "
            "running code from the file. Leave source out, and pass load(path, model=...)."
        )
    try:
        plain: dict[str, Any] = json.loads(json.dumps(kwargs))
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"source_kwargs: expected numbers, texts, booleans and lists ({error}).") from None
    return plain


def _collect(frozen: nn.Module) -> tuple[dict[str, TensorEntry], dict[str, Tensor]]:
    """Return the manifest's entries and the tensors to store, in the order of the state dict."""
    bits = {
        f"{name}.weight_codes".lstrip("."): module.settings.w_bits
        for name, module in frozen.named_modules(remove_duplicate=False)
        if isinstance(module, FrozenLayer)
    }
    entries: dict[str, TensorEntry] = {}
    stored: dict[str, Tensor] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for key, value in frozen.state_dict().items():
        if not isinstance(value, Tensor):
            raise ArtifactError(f"{key}: its extra state is no tensor ({type(value).__name__}) and cannot be saved.")
        identity = (value.data_ptr(), value.dtype, tuple(value.shape), value.stride())
        shape, dtype = tuple(value.shape), str(value.dtype).removeprefix("torch.")
        same = seen.setdefault(identity, key) if value.numel() else key
        if same != key:
            entries[key] = TensorEntry(dtype, shape, same_as=same)
            continue
        width = bits.get(key)
        entries[key] = TensorEntry(dtype, shape, bits=width)
        cpu = value.detach().cpu()
        stored[key] = pack(cpu, width) if width is not None else cpu.contiguous().clone()
    return entries, stored


def _model_dtype(frozen: nn.Module, dtypes: Counter[str]) -> str:
    """Dtype of the frozen layers' operands; where there is none, the commonest floating dtype."""
    for module in frozen.modules():
        if isinstance(module, FrozenLayer):
            return str(module.dtype).removeprefix("torch.")
    return dtypes.most_common(1)[0][0] if dtypes else "float32"


def _own_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("daqconvert")
    except PackageNotFoundError:
        return "source"
