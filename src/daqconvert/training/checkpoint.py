"""A checkpoint: one safetensors file, tensors by name and a JSON text in its metadata, under one SHA-256. No pickle.

Tensors are called `model/KEY` (the state dict), `optimizer/GROUP/SLOT/PARAMETER` and `part/PART/NAME`. The metadata
holds `format`, `version`, `json` and `sha256`. The SHA-256 covers the JSON text and then, for each tensor in the order
of the names, the text `NAME torch.float32 (2, 3)` (name, dtype, shape) and the tensor's bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from daqconvert.convert import require_quantized
from daqconvert.errors import TrainingError, first_few
from daqconvert.files import replacing
from daqconvert.spec.plain_values import to_plain

FORMAT, VERSION = "daqconvert-checkpoint", 2
READABLE = ("1", "2")  # version 1 holds whole epochs only: its model can be loaded, its run not resumed
MODEL, OPTIMIZER, PART = "model/", "optimizer/", "part/"
COUNTS = ("step", "mu_product")  # slots of an optimizer's state that are numbers, whatever the parameter's shape
_AGAIN = "Start again with overwrite=True, or put a good copy in its place."
NOT_WRITTEN = "Free some space or choose another out_dir, then go on with resume=True."


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file holds.

    Attributes:
        tensors: The tensors by full name, on the CPU.
        meta: What `saving.meta` wrote: recipe, settings of the layers, epochs done, history, ...
    """

    tensors: Mapping[str, Tensor]
    meta: Mapping[str, Any]

    def part(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors whose name starts with `prefix`, by the rest of the name."""
        return {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's state dict under `model/`.

    Raises:
        TrainingError: If an entry is not a tensor, which a file without pickle cannot hold.
    """
    state = model.state_dict()
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise TrainingError(
                f"{type(model).__name__}: state dict entry {key!r} is a {type(value).__name__}, and a checkpoint "
                "holds tensors only. Make it a buffer, or train with out_dir=None."
            )
    return {MODEL + key: value for key, value in state.items()}


def write_checkpoint(
    path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], before: Callable[[], None] | None = None
) -> None:
    """Write a checkpoint so that the file is either the old one or the new one, whatever happens meanwhile.

    Tied tensors are written under each of their names. `before` is called when the new file is on the disk and the
    old one is still in its place.

    Raises:
        TrainingError: If it cannot be written; what was there before is unchanged.
    """
    plain = {key: value.detach().to("cpu", copy=True).contiguous() for key, value in tensors.items()}
    text = json.dumps(meta)
    header = {"format": FORMAT, "version": str(VERSION), "json": text, "sha256": digest(plain, text)}
    with replacing(path, TrainingError, NOT_WRITTEN) as temporary:
        save_file(plain, temporary, metadata=header)
        if before is not None:
            before()


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint and check that nothing in it was changed.

    Raises:
        TrainingError: If it is missing, truncated, edited, from a newer version, or not a checkpoint.
    """
    if not path.is_file():
        raise TrainingError(f"{path}: no such checkpoint.")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (no mapping)
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TrainingError(f"{path}: damaged, or no safetensors file ({what}). {_AGAIN}") from None
    if header.get("format") != FORMAT:
        raise TrainingError(f"{path}: no checkpoint of daqconvert: its metadata has no format = {FORMAT!r}.")
    version = header.get("version", "")
    if version not in READABLE:
        raise TrainingError(
            f"{path}: expected a checkpoint of version {VERSION}, found {version!r}. Update daqconvert to read it."
        )
    text = header.get("json", "")
    if digest(tensors, text) != header.get("sha256"):
        raise TrainingError(f"{path}: its contents do not match their SHA-256: damaged or edited. {_AGAIN}")
    return Checkpoint(_widened(tensors), json.loads(text))


def _widened(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a checkpoint's tensors with shape `(1,)` where an earlier version had scalar bounds and output scales.

    What the optimizers keep of such a parameter gets this shape too, but no count of steps.
    """
    keys = {key.removeprefix(MODEL) for key in tensors if key.startswith(MODEL)}
    quantizers = {key.removesuffix(".calibrated") for key in keys if key.endswith(".calibrated")}
    sites = {quantizer.rpartition(".")[0] for quantizer in quantizers}
    own = {f"{quantizer}.{name}" for quantizer in quantizers for name in ("lower", "upper", "step")}
    own |= {f"{site}.output_scale" if site else "output_scale" for site in sites}
    scalars = {key for key in own & keys if tensors[MODEL + key].dim() == 0}

    def is_widened(key: str) -> bool:
        if not key.startswith(OPTIMIZER):
            return key.startswith(MODEL) and key.removeprefix(MODEL) in scalars
        _, slot, parameter = key.removeprefix(OPTIMIZER).split("/", 2)
        return parameter in scalars and ":" not in slot and slot not in COUNTS

    return {key: t.reshape(1) if t.dim() == 0 and is_widened(key) else t for key, t in tensors.items()}


def digest(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """Return the SHA-256 of a text and of tensors by name, as hexadecimal digits.

    Example:
        >>> digest({"a": torch.zeros(2)}) == digest({"a": torch.zeros(2)})
        True
    """
    found = hashlib.sha256(text.encode("utf-8"))
    for key in sorted(tensors):
        value = tensors[key].detach().cpu().contiguous()
        found.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def load_weights(qmodel: nn.Module, path: str | Path) -> Mapping[str, Any]:
    """Load the weights that `finetune` saved in a checkpoint into a quantized model, in place.

    Args:
        qmodel: A model that `quantize` made with the settings of the run.
        path: A checkpoint that `finetune` wrote, such as `runs/a/best.safetensors`.

    Returns:
        The checkpoint's metadata: `recipe`, `epochs_done`, `history`, ...

    Raises:
        TrainingError: If the file is damaged, or its layers, names or shapes are not the model's; the model is
            unchanged then.

    Example:
        >>> import tempfile, torch, daqconvert as dq
        >>> qmodel = dq.quantize(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), w_bits=4, a_bits=4)
        >>> batches = [(torch.randn(8, 4), torch.randint(0, 2, (8,)))]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     result = dq.finetune(qmodel, batches, batches, out_dir=f"{folder}/run", epochs=1)
        ...     checkpoint = dq.load_weights(qmodel, result.best)
        >>> checkpoint["epochs_done"]
        1
    """
    checkpoint = read_checkpoint(Path(path))
    check_model(checkpoint, qmodel, str(path))
    qmodel.load_state_dict(checkpoint.part(MODEL))
    return checkpoint.meta


def layer_settings(qmodel: nn.Module) -> dict[str, dict[str, Any]]:
    """Return the settings of every quantized layer as plain values, by dotted name."""
    layers = require_quantized(qmodel, "finetune")
    return {name: to_plain(layer.settings) for name, layer in layers.items()}


def check_model(
    checkpoint: Checkpoint, qmodel: nn.Module, where: str, layers: Mapping[str, Any] | None = None
) -> None:
    """Raise unless a checkpoint fits a model: the same layers and settings, the same tensor names and shapes.

    `where` names the file in the message. `layers` are the settings to compare with; None stands for those that the
    model has now.

    Raises:
        TrainingError: If it does not fit; names what differs.
    """
    saved, found = checkpoint.part(MODEL), qmodel.state_dict()
    problems = _settings_problems(checkpoint.meta.get("layers", {}), layers or layer_settings(qmodel))
    problems += [f"{key}: only in the checkpoint" for key in saved if key not in found]
    problems += [f"{key}: only in the model" for key in found if key not in saved]
    problems += [
        f"{key}: shape {tuple(saved[key].shape)} in the checkpoint, {tuple(value.shape)} in the model"
        for key, value in found.items()
        if key in saved and isinstance(value, Tensor) and value.shape != saved[key].shape
    ]
    if problems:
        raise TrainingError(
            f"{where}: the checkpoint does not fit {type(qmodel).__name__}: {first_few(problems)}. "
            "Quantize the same model with the same policy as for the run, or choose another out_dir."
        )


def _settings_problems(saved: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    problems = [f"{name}: quantized only in the checkpoint" for name in saved if name not in found]
    problems += [f"{name}: quantized only in the model" for name in found if name not in saved]
    for name in saved.keys() & found.keys():
        ours, theirs = found[name], saved[name]
        problems += [
            f"{name}: {key} = {theirs.get(key)!r} in the checkpoint, {ours.get(key)!r} in the model"
            for key in sorted(ours.keys() | theirs.keys())
            if ours.get(key) != theirs.get(key)
        ]
    return sorted(problems)
