"""Where float models come from: a source, which is a string that names a model, and files of float weights.

A source is `timm:NAME`, `torchvision:NAME`, `hf-hub:ORG/NAME` (through timm) or `module:function`; a bare name is a
timm name. An import path runs code, so it is imported only when a user types it, and only `timm:` and `torchvision:`
sources may be named in an artifact (`Source.is_trusted_name`). Nothing here uses the network unless it is called with
`pretrained=True`.

Weights are read from safetensors, or from torch files that hold tensors only: no pickled code is ever run.
"""

from __future__ import annotations

import importlib
import inspect
import pickle
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from daqconvert.errors import ConversionError, nearest

IMPORT_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
PLAIN_NAME = re.compile(r"[A-Za-z0-9_][\w.\-]*")
FORMS = "timm:NAME (or NAME alone), torchvision:NAME, hf-hub:ORG/NAME, module:function"


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Attributes:
        kind: `"timm"`, `"torchvision"`, `"hf-hub"` or `"import"`.
        name: Name of the model within its kind; for `"import"` the path `module:function`.
    """

    kind: str
    name: str

    @property
    def is_trusted_name(self) -> bool:
        """Whether building the model runs only code of timm or torchvision, without a download."""
        return self.kind in ("timm", "torchvision")

    def __str__(self) -> str:
        return self.name if self.kind == "import" else f"{self.kind}:{self.name}"


def parse_source(text: str | Source) -> Source:
    """Return the `Source` that a string names; nothing is imported or looked up.

    Raises:
        ConversionError: If the string has none of the forms of a source.

    Example:
        >>> parse_source("resnet18"), parse_source("torchvision:resnet18").is_trusted_name
        (Source(kind='timm', name='resnet18'), True)
        >>> parse_source("my.models:build").is_trusted_name
        False
    """
    if isinstance(text, Source):
        return text
    text = text.strip()
    kind, colon, name = text.partition(":")
    if kind == "timm" and name.startswith("hf-hub:"):
        kind, name = "hf-hub", name.removeprefix("hf-hub:")
    if kind == "hf-hub" and re.fullmatch(r"[\w.\-]+/[\w.\-@]+", name):
        return Source("hf-hub", name)
    if kind in ("timm", "torchvision") and PLAIN_NAME.fullmatch(name):
        return Source(kind, name)
    if not colon and PLAIN_NAME.fullmatch(text):
        return Source("timm", text)
    if kind not in ("timm", "torchvision", "hf-hub") and IMPORT_PATH.fullmatch(text):
        return Source("import", text)
    raise ConversionError(f"Model {text!r}: expected {FORMS}.")


def build_model(
    source: str | Source, pretrained: bool = False, checkpoint: str | Path | None = None, **kwargs: Any
) -> nn.Module:
    """Build the model that a source names, in training mode, on the CPU.

    The module of an import path is imported with the current folder on the path. With `pretrained` the published
    weights are downloaded, or taken from the cache; a `checkpoint` is loaded as `load_checkpoint` does. Further
    arguments are the builder's, such as `num_classes=10` or `in_chans=1`.

    Raises:
        ConversionError: For an unknown name, an argument the builder does not take, a failed download, a checkpoint
            that does not fit.

    Example:
        >>> build_model("timm:test_resnet", num_classes=10).num_classes
        10
    """
    source = parse_source(source)
    builder = {"timm": _build_timm, "hf-hub": _build_timm, "torchvision": _build_torchvision, "import": _build_import}
    with warnings.catch_warnings():
        # GoogLeNet and Inception warn that their default initialization will change, which does not concern users.
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*default weight initialization.*")
        model = builder[source.kind](source, pretrained, kwargs)
    if checkpoint is not None:
        load_checkpoint(model, checkpoint)
    return model


def _build_timm(source: Source, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    import timm

    name = source.name
    if source.kind == "hf-hub":
        if not pretrained:
            raise ConversionError(f"{source}: even its configuration is a download. Ask for pretrained weights.")
        name = str(source)
    else:
        architecture, _, tag = name.partition(".")
        if not timm.is_model(architecture):
            raise ConversionError(_unknown(source, architecture, timm.list_models(), "torchvision"))
        tags = [known.partition(".")[2] for known in timm.list_models(f"{architecture}.*", pretrained=True)]
        if tag and tag not in tags:
            raise ConversionError(f"{source}: timm's {architecture} has no weights {tag!r}; it has {', '.join(tags)}.")
    return _call(lambda: timm.create_model(name, pretrained=pretrained, **kwargs), source, pretrained, kwargs)


def _build_torchvision(source: Source, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    from torchvision import models

    if source.name not in models.list_models():
        raise ConversionError(_unknown(source, source.name, models.list_models(), "timm"))
    builder = inspect.unwrap(models.get_model_builder(source.name))
    if "weights_backbone" in inspect.signature(builder).parameters and not pretrained:
        kwargs = {"weights_backbone": None, **kwargs}  # detection and segmentation models would download by default
    weights = "DEFAULT" if pretrained else None
    return _call(lambda: models.get_model(source.name, weights=weights, **kwargs), source, pretrained, kwargs)


def _unknown(source: Source, name: str, valid: list[str], other: str) -> str:
    from timm import list_models
    from torchvision import models

    there = models.list_models() if other == "torchvision" else list_models()
    hint = f" There is a {other}:{name}." if name in there else nearest(name, valid)
    return f"{source}: {source.kind} has no model {name!r}.{hint} Expected {FORMS}."


def _call(build: Callable[[], nn.Module], source: Source, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    try:
        return build()
    except Exception as error:  # downloads raise errors of many types, which mean the same to the user
        what = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
        if pretrained and not isinstance(error, TypeError):
            raise ConversionError(
                f"{source}: its pretrained weights could not be had ({what}). Check the connection, or give a file of "
                "weights as the checkpoint."
            ) from error
        given = ", ".join(f"{key}={value!r}" for key, value in kwargs.items()) or "no arguments"
        raise ConversionError(f"{source} could not be built with {given} ({what}).") from error


def _build_import(source: Source, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    module_name, _, path = source.name.partition(":")
    function = _import_object(source, module_name, path)
    if not callable(function):
        raise ConversionError(f"{source}: expected a function that returns a module, found {type(function).__name__}.")
    kwargs = {**kwargs, "pretrained": True} if pretrained else kwargs
    try:
        inspect.signature(function).bind(**kwargs)
    except (TypeError, ValueError) as error:  # ValueError: a built-in type, which has no signature
        raise ConversionError(f"{source} cannot be called with {kwargs!r}: {error}.") from error
    try:
        model = function(**kwargs)
    except Exception as error:
        raise ConversionError(f"{source} failed: {_where(error)}") from error
    if not isinstance(model, nn.Module):
        raise ConversionError(f"{source}: expected it to return a torch.nn.Module, found {type(model).__name__}.")
    return model


def _import_object(source: Source, module_name: str, path: str) -> Any:
    here = str(Path.cwd())
    sys.path.insert(0, here)  # a console script does not have the current folder on its path
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:
        raise ConversionError(f"{source}: {module_name} could not be imported: {_where(error)}") from error
    finally:
        sys.path.remove(here)
    for part in path.split("."):
        if not hasattr(found, part):
            close = nearest(part, [name for name in dir(found) if not name.startswith("_")])
            raise ConversionError(f"{source}: no {part!r} in {found.__name__}.{close}")
        found = getattr(found, part)
    return found


def _where(error: Exception) -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<")]
    if isinstance(error, SyntaxError) or not frames or frames[-1].filename == importlib.__file__:
        return f"{type(error).__name__}: {error}"
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})"
    return f"{type(error).__name__}: {error}{place}"


def load_checkpoint(model: nn.Module, path: str | Path) -> None:
    """Load a state dict from a file into a model, strictly; the model is unchanged if it does not fit.

    The file is safetensors, or a torch file that holds tensors only. What training scripts wrap around a state dict is
    taken off: an entry `state_dict` or `model`, and `module.` before every name. `num_batches_tracked` may be missing,
    because no forward in evaluation mode reads it.

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
