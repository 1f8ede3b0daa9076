"""The verb `load`: an artifact back to a frozen model, everything checked before anything is used."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from daqconvert.artifact.manifest import TENSORS, Manifest, TensorEntry, read_manifest
from daqconvert.artifact.save import sha256
from daqconvert.convert import PLAN_ATTRIBUTE
from daqconvert.errors import ArtifactError, DaqError
from daqconvert.functional.packing import packed_size, unpack
from daqconvert.layers.frozen import FrozenLayer
from daqconvert.layers.registry import frozen_class, quantized_class
from daqconvert.sources import build_model, parse_source


def load(path: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Load a frozen model from an artifact directory.

    The model is rebuilt from the source that the artifact names (timm or torchvision, without a download), or a
    skeleton is passed: any model of the same structure, whose values do not matter. Its stored plan is applied, every
    shape is checked, then the values are loaded. No pickle is read, no code is taken from the file.

    Args:
        path: The directory.
        model: The skeleton; it is not changed.

    Returns:
        The frozen model, identical to the one that was saved, on the CPU (on the skeleton's device if one is passed).

    Raises:
        ArtifactError: If the artifact is missing, truncated, edited, from a newer version, names no source where no
            skeleton is passed, or does not fit the skeleton.

    Example:
        >>> import tempfile, daqconvert as dq
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> qmodel, x = dq.quantize(model, w_bits=4, a_bits=4), torch.randn(8, 4)
        >>> report, frozen = dq.calibrate(qmodel, [x]), dq.freeze(qmodel)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     again = dq.load(dq.save(frozen, folder + "/artifact"), model=model)
        >>> torch.equal(again(x), frozen(x))
        True
    """
    manifest = read_manifest(path)
    tensors = _read_tensors(Path(path) / TENSORS, manifest)
    skeleton = _build(path, manifest) if model is None else copy.deepcopy(model)
    if getattr(torch, manifest.dtype) != torch.float32 and model is None:
        skeleton = skeleton.to(getattr(torch, manifest.dtype))
    frozen = _apply_plan(skeleton, manifest, path)
    _check_keys(frozen, manifest, path)
    device = next((t.device for t in (*frozen.parameters(), *frozen.buffers())), torch.device("cpu"))
    state = {key: value.to(device) for key, value in _unpacked(tensors, manifest).items()}
    frozen.load_state_dict(state, strict=True, assign=True)
    frozen.requires_grad_(False)
    return frozen


def _read_tensors(file: Path, manifest: Manifest) -> dict[str, Tensor]:
    """Read the tensor file after its size, checksum, names, dtypes and shapes are found right."""
    if not file.is_file():
        raise ArtifactError(f"{file}: missing. The artifact is incomplete; save it again.")
    size = file.stat().st_size
    if size != manifest.bytes:
        raise ArtifactError(f"{file}: expected {manifest.bytes} bytes, found {size}: truncated or replaced.")
    if sha256(file) != manifest.sha256:
        raise ArtifactError(f"{file}: its SHA-256 is not the one in the manifest: damaged or edited. Save it again.")
    stored = {key: entry for key, entry in manifest.tensors.items() if entry.same_as is None}
    try:
        with safe_open(str(file), framework="pt") as reader:
            difference = sorted(set(reader.keys()) ^ set(stored))
            if difference:
                raise ArtifactError(f"{file}: tensor {difference[0]!r} stands in only one of file and manifest.")
            return {key: _read_one(file, reader.get_tensor(key), key, entry) for key, entry in stored.items()}
    except SafetensorError as error:
        raise ArtifactError(f"{file}: not readable as safetensors ({error}).") from None


def _read_one(file: Path, value: Tensor, key: str, entry: TensorEntry) -> Tensor:
    shape = entry.shape if entry.bits is None else (packed_size(_count(entry.shape), entry.bits),)
    if tuple(value.shape) != shape or str(value.dtype) != f"torch.{entry.dtype}":
        raise ArtifactError(
            f"{file}: {key}: expected {entry.dtype} {shape}, found {str(value.dtype)[6:]} {tuple(value.shape)}."
        )
    return value


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _build(path: str | Path, manifest: Manifest) -> nn.Module:
    if manifest.source is None:
        raise ArtifactError(
            f"{path}: names no source to rebuild {manifest.model} from. Pass one of the same structure: "
            f"daqconvert.load({str(path)!r}, model={manifest.model}(...))."
        )
    source = parse_source(manifest.source)
    if not source.is_trusted_name:
        raise ArtifactError(f"{path}: source {manifest.source!r} is neither timm:NAME nor torchvision:NAME.")
    try:
        return build_model(source, pretrained=False, **manifest.source_kwargs)
    except (DaqError, TypeError) as error:
        raise ArtifactError(
            f"{path}: its source {manifest.source!r} could not be built here ({error}). "
            "Pass a skeleton instead: daqconvert.load(path, model=...)."
        ) from error


def _apply_plan(skeleton: nn.Module, manifest: Manifest, path: str | Path) -> nn.Module:
    """Turn the sites of the plan into empty frozen layers."""
    modules = dict(skeleton.named_modules(remove_duplicate=False))
    if type(skeleton).__name__ != manifest.model and "" not in (row.name for row in manifest.plan.converted):
        raise ArtifactError(f"{path}: was saved from a {manifest.model}, found a {type(skeleton).__name__}.")
    for row in manifest.plan.converted:
        assert row.settings is not None
        layer = modules.get(row.name)
        where = f"{path}: {row.name or '(root)'}"
        if layer is None or type(layer).__name__ != row.site.kind or quantized_class(type(layer)) is None:
            found = "no such layer" if layer is None else f"a {type(layer).__name__}"
            raise ArtifactError(f"{where}: expected a float {row.site.kind}, found {found}. Is it the same network?")
        shape = tuple(getattr(layer.weight, "shape", ()))
        if shape != row.site.weight_shape:
            raise ArtifactError(f"{where}: expected a weight of shape {row.site.weight_shape}, found {shape}.")
        frozen_class(type(layer)).skeleton(layer, row.settings, row.name)
    for module in skeleton.modules():
        module.training = False
        if isinstance(module, FrozenLayer):
            module.dtype = getattr(torch, manifest.dtype)
    object.__setattr__(skeleton, PLAN_ATTRIBUTE, manifest.plan)
    return skeleton


def _check_keys(frozen: nn.Module, manifest: Manifest, path: str | Path) -> None:
    wanted = frozen.state_dict()
    problems = [f"{key} is missing in the artifact" for key in wanted if key not in manifest.tensors]
    problems += [f"{key} is not in the model" for key in manifest.tensors if key not in wanted]
    problems += [
        f"{key}: the model has shape {tuple(value.shape)}, the artifact {manifest.tensors[key].shape}"
        for key, value in wanted.items()
        if key in manifest.tensors and tuple(value.shape) != manifest.tensors[key].shape
    ]
    if problems:
        raise ArtifactError(f"{path}: does not fit {type(frozen).__name__}: {'; '.join(problems[:3])}.")


def _unpacked(tensors: Mapping[str, Tensor], manifest: Manifest) -> dict[str, Tensor]:
    """Return the whole state dict; names that share a tensor get the same one."""
    state: dict[str, Tensor] = {}
    for key, entry in manifest.tensors.items():
        if entry.same_as is None:
            value = tensors[key]
            state[key] = value if entry.bits is None else unpack(value, entry.bits, entry.shape)
    for key, entry in manifest.tensors.items():
        if entry.same_as is not None:
            state[key] = state[entry.same_as]
    return state
