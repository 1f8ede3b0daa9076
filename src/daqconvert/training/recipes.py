"""Recipes: everything that decides a training run besides model and data, as one frozen dataclass.

Learning rates are per optimizer step and follow the schedule from step 0; `epochs` counts passes over the loader.
"""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from daqconvert.calibration import METHODS
from daqconvert.errors import TrainingError, nearest
from daqconvert.training.fields import (
    Check,
    below_one,
    choice,
    count,
    limit,
    nonnegative,
    positive,
    share,
    text,
)


@dataclass(frozen=True)
class Recipe:
    """How to train: optimizers, schedule, loss, calibration, seed. The defaults are the recipe `quick`.

    Attributes:
        name: Where the recipe comes from, for messages.
        epochs: Passes over the training loader.
        lr: Learning rate of SGD, which trains everything that is not a quantizer's.
        momentum: Of SGD.
        weight_decay: Of SGD; quantizers get none.
        decay: Which of SGD's parameters decay: `"all"` as published, or `"weights"`, not biases and norms.
        quantizer_lr: Learning rate of Adam, which trains `lower`, `upper` and `output_scale`.
        schedule: `"cosine"` to 0, or `"constant"`; both learning rates, every step.
        warmup_steps: Steps over which both learning rates rise linearly first.
        batch_size: For whoever makes the loaders, as the command line does; a loader that is passed keeps its own.
        label_smoothing: Of the cross entropy.
        distill: Weight 0..1 of the distillation loss, towards the float model; 1 needs no targets.
        temperature: Of the distillation's softmax.
        clip_grad: Largest norm of the gradient, or None (0) for no limit.
        batch_norm: `"train"`, or `"freeze"` to keep the running statistics and use them.
        calibration_batches: Training batches that set bounds which were not calibrated before.
        calibration_method: As `calibrate` takes it.
        seed: Of shuffling, augmentation and dropout.

    Example:
        >>> Recipe(epochs=2).schedule
        'cosine'
    """

    name: str = "quick"
    epochs: int = 5
    lr: float = 0.02
    momentum: float = 0.9
    weight_decay: float = 1e-4
    decay: str = "all"
    quantizer_lr: float = 1e-3
    schedule: str = "cosine"
    warmup_steps: int = 0
    batch_size: int = 64
    label_smoothing: float = 0.0
    distill: float = 0.5
    temperature: float = 2.0
    clip_grad: float | None = None
    batch_norm: str = "train"
    calibration_batches: int = 8
    calibration_method: str = "mse"
    seed: int = 0

    def __post_init__(self) -> None:
        for field in FIELDS:
            value = getattr(self, field)
            try:
                object.__setattr__(self, field, _CHECKS[field](value))
            except ValueError as error:
                raise TrainingError(f"recipe {self.name!r}: {field}: expected {error}; found {value!r}.") from None

    def replace(self, **changes: Any) -> Recipe:
        """Return a copy with some fields changed.

        Args:
            **changes: Field name -> value.

        Raises:
            TrainingError: If there is no such field or it cannot take that value; names the nearest valid one.
        """
        _check_names(changes, f"recipe {self.name!r}")
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dict of plain values."""
        return dataclasses.asdict(self)

    def to_toml(self) -> str:
        """Return the recipe as TOML that `recipe` reads back.

        Example:
            >>> Recipe(epochs=2).to_toml().splitlines()[:2]
            ['name = "quick"', 'epochs = 2']
        """
        values = {key: 0 if value is None else value for key, value in self.to_dict().items()}
        return "".join(f"{key} = {_toml(value)}\n" for key, value in values.items())


FIELDS = tuple(field.name for field in dataclasses.fields(Recipe))


def recipe(source: str | Path | Recipe = "quick", **overrides: Any) -> Recipe:
    """Return a recipe by name, from a TOML file, or as given, with some fields changed.

    Args:
        source: A name of `RECIPES`, the path of a TOML file (`base = "quick"` and any field), or a `Recipe`.
        **overrides: Fields to change.

    Raises:
        TrainingError: If there is no such recipe, file or field; names the nearest valid one.

    Example:
        >>> recipe("paper-cifar10", epochs=5).lr
        0.1
    """
    if isinstance(source, Recipe):
        found = source
    elif isinstance(source, str) and source in RECIPES:
        found = RECIPES[source]
    elif isinstance(source, (str, Path)) and (Path(source).suffix == ".toml" or Path(source).is_file()):
        found = _from_file(Path(source))
    else:
        close = nearest(source, RECIPES) if isinstance(source, str) else ""
        raise TrainingError(
            f"recipe: expected one of {', '.join(RECIPES)}, the path of a TOML file, or a Recipe; "
            f"found {source!r}.{close}"
        )
    return found.replace(**overrides) if overrides else found


def _from_file(path: Path) -> Recipe:
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise TrainingError(f"recipe {path}: cannot be read ({error.strerror or error}). Check the path.") from None
    except (ValueError, RecursionError) as error:  # TOMLDecodeError and UnicodeDecodeError are ValueErrors
        raise TrainingError(f"recipe {path}: not valid TOML ({error}).") from None
    base = values.pop("base", "quick")
    if not isinstance(base, str) or base not in RECIPES:
        close = nearest(base, RECIPES) if isinstance(base, str) else ""
        raise TrainingError(f"recipe {path}: base: expected one of {', '.join(RECIPES)}; found {base!r}.{close}")
    _check_names(values, f"recipe {path}")
    return dataclasses.replace(RECIPES[base], **{"name": path.name, **values})


def _check_names(values: Mapping[str, Any], where: str) -> None:
    for name in values:
        if name not in FIELDS:
            raise TrainingError(f"{where}: {name!r} is not a field of a recipe.{nearest(name, FIELDS)}")


def _toml(value: Any) -> str:
    if isinstance(value, str):  # JSON's escapes are TOML's, but for DEL, which TOML wants escaped as well
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)


_CHECKS: dict[str, Check] = {
    "name": text,
    "epochs": count(1),
    "lr": nonnegative,
    "momentum": below_one,
    "weight_decay": nonnegative,
    "decay": choice("all", "weights"),
    "quantizer_lr": nonnegative,
    "schedule": choice("cosine", "constant"),
    "warmup_steps": count(0),
    "batch_size": count(1),
    "label_smoothing": below_one,
    "distill": share,
    "temperature": positive,
    "clip_grad": limit,
    "batch_norm": choice("train", "freeze"),
    "calibration_batches": count(1),
    "calibration_method": choice(*METHODS),
    "seed": count(0),
}

_PUBLISHED: dict[str, Any] = {
    "momentum": 0.9, "weight_decay": 1e-4, "schedule": "cosine", "batch_size": 256, "distill": 0.0,
    "calibration_batches": 1, "calibration_method": "std",
}  # fmt: skip

RECIPES: dict[str, Recipe] = {
    "quick": Recipe(),
    "paper-cifar10": Recipe("paper-cifar10", epochs=400, lr=0.1, quantizer_lr=1e-4, **_PUBLISHED),
    "paper-imagenet": Recipe("paper-imagenet", epochs=100, lr=0.01, quantizer_lr=1e-5, **_PUBLISHED),
}
