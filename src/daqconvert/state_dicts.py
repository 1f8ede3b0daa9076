"""Files of float weights: safetensors, or torch files that hold tensors only (no pickled code is ever run)."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from daqconvert.errors import ConversionError


def load_checkpoint(model: nn.Module, path: str | Path) -> None:
    """Load a state dict from a file into a model, strictly; the model is unchanged if it does not fit.

    A training script's wrapping is taken off: the entry `state_dict` or `model`, and a `module.` before every name.
    `num_batches_tracked`, which no forward in evaluation reads, may be missing.

    Args:
        model: The model to fill.
        path: A `.safetensors` file, or a torch file that holds tensors only.

    Raises:
        ConversionError: If the file is missing or damaged, or its names and shapes are not the model's.
    """
    path = Path(path)
    found = _read_tensors(path)
    wanted = model.state_dict()
    found |= {k: v for k, v in wanted.items() if k not in found and k.endswith("num_batches_tracked")}
    problems = [
        ("missing", [k for k in wanted if k not in found]),
        ("unexpected", [k for k in found if k not in wanted]),
        ("of another shape", [_shapes(k, wanted[k], v) for k, v in found.items() if _differs(wanted.get(k), v)]),
    ]
    if any(names for _, names in problems):
        told = "; ".join(f"{len(names)} {what}: {_first(names)}" for what, names in problems if names)
        raise ConversionError(f"{path} does not fit {type(model).__name__}: {told}.")
    model.load_state_dict(found)


def _differs(wanted: Any, found: Tensor) -> bool:
    return isinstance(wanted, Tensor) and wanted.shape != found.shape


def _shapes(name: str, wanted: Tensor, found: Tensor) -> str:
    return f"{name} (expected {tuple(wanted.shape)}, found {tuple(found.shape)})"


def _first(names: list[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


def _read_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise ConversionError(f"{path}: no such checkpoint file.")
    try:
        is_safe = path.suffix == ".safetensors"
        found = load_file(path) if is_safe else torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConversionError(
            f"{path} could not be read as {'safetensors' if is_safe else 'a torch file of tensors alone'} ({what})."
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ConversionError(f"{path}: expected a state dict, names to tensors; found {type(found).__name__}.")
    prefix = "module." if found and all(key.startswith("module.") for key in found) else ""
    return {key.removeprefix(prefix): value for key, value in found.items()}
