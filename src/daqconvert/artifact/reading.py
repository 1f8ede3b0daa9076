"""The verb `load`: an artifact becomes a frozen model again; all of it is checked before any of it is used."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from daqconvert.artifact.builders import build, outline
from daqconvert.artifact.manifest import MANIFEST, TENSORS, Manifest, read_manifest, told
from daqconvert.artifact.skeleton import check_values, fit
from daqconvert.artifact.tensors import read_tensors
from daqconvert.errors import ArtifactError
from daqconvert.models import copy_model


def load(path: str | Path, model: nn.Module | Callable[[], nn.Module] | None = None) -> nn.Module:
    """Load a frozen model from an artifact directory.

    The model is rebuilt from the source that the artifact names (timm or torchvision, without a download), or from a
    *skeleton*: any float model of the same structure, whose values do not matter. The stored plan is applied to it,
    every shape is checked, then the values are loaded. No pickle is read, and no code is taken from the file.

    Args:
        path: The directory.
        model: The skeleton, which is not changed, or a function that builds it. It may be on the `meta` device if its
            state dict holds all its buffers.

    Returns:
        The frozen model, identical to the one that was saved. Each tensor is on the device of the skeleton's tensor,
        or on the CPU if that is `meta`. Buffers that no state dict holds are the skeleton's.

    Raises:
        ArtifactError: If the artifact is missing, truncated, edited or from a newer version, names no source and no
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
    manifest, where = read_manifest(path), str(Path(path) / MANIFEST)
    state = read_tensors(Path(path) / TENSORS, manifest)
    skeleton = _rebuild(path, manifest, where) if model is None else _skeleton(model)
    frozen = fit(skeleton, manifest, where)
    check_values(frozen, state, str(Path(path) / TENSORS))
    try:
        frozen.load_state_dict(_placed(frozen, state, manifest), strict=True, assign=True)
    except (RuntimeError, TypeError, ValueError, KeyError) as error:  # a module may have a loading hook of its own
        raise ArtifactError(f"{where}: does not fit {type(frozen).__name__} ({told(error)}).") from error
    frozen.requires_grad_(False)
    left = [name for name, tensor in (*frozen.named_parameters(), *frozen.named_buffers()) if tensor.is_meta]
    if left:
        raise ArtifactError(
            f"{path}: {left[0]} is in no state dict, so its values come from the skeleton, which has none (it is on "
            "the meta device). Pass a skeleton on the CPU."
        )
    return frozen


def _skeleton(model: nn.Module | Callable[[], nn.Module]) -> nn.Module:
    """Return a copy of the skeleton, or what the function builds."""
    if isinstance(model, nn.Module):
        return copy_model(model)
    if not callable(model):
        raise ArtifactError(
            f"load: model: expected a module, or a function that builds one, found {type(model).__name__}."
        )
    built = model()
    if not isinstance(built, nn.Module):
        raise ArtifactError(f"load: model: expected a function that returns a module, found {type(built).__name__}.")
    return built


def _rebuild(path: str | Path, manifest: Manifest, where: str) -> nn.Module:
    """Build the model from its source, after making sure that it fits the stored tensors."""
    if manifest.source is None:
        raise ArtifactError(
            f"{path}: names no source to rebuild {manifest.model} from. Pass one of the same structure: "
            f"daqconvert.load({str(path)!r}, model={manifest.model}(...))."
        )
    try:
        try_source(manifest, where)
        return build(manifest.source, manifest.source_kwargs, len(manifest.tensors))
    except ArtifactError as error:
        raise ArtifactError(f"{error} Or pass a skeleton: daqconvert.load(path, model=...).") from error


def try_source(manifest: Manifest, where: str) -> None:
    """Raise unless the manifest's source builds a model that its tensors fit; no large tensor is made for this.

    Raises:
        ArtifactError: If they do not fit; the message begins with `where` and names what differs.
    """
    if manifest.source is None:
        return
    elements = sum(math.prod(entry.shape) for entry in manifest.tensors.values() if entry.stored_bytes)
    try:
        model = outline(manifest.source, manifest.source_kwargs, len(manifest.tensors), elements)
    except ArtifactError as error:
        raise ArtifactError(f"{where}: {error}") from error
    fit(model, manifest, f"{where}: source {manifest.source!r}")


def _placed(frozen: nn.Module, state: dict[str, Tensor], manifest: Manifest) -> dict[str, Tensor]:
    """Return the state dict on the model's devices; parameters that share a tensor stay one parameter."""
    parameters = {name for name, _ in frozen.named_parameters(remove_duplicate=False)}
    state_dict = frozen.state_dict()
    placed: OrderedDict[str, Tensor] = OrderedDict()
    # NOTE: a module may ask for the version of its own format, as torchvision's MNASNet does
    placed._metadata = getattr(state_dict, "_metadata", OrderedDict())  # type: ignore[attr-defined]
    shared: dict[tuple[str, torch.device, bool], Tensor] = {}
    for key, place in state_dict.items():
        device = torch.device("cpu") if place.is_meta else place.device
        identity = (manifest.tensors[key].same_as or key, device, key in parameters)
        if identity not in shared:
            value = state[key].to(device)
            shared[identity] = nn.Parameter(value, requires_grad=False) if key in parameters else value
        placed[key] = shared[identity]
    return placed
