"""The recipes that have a name.

References: "Distance-aware Quantization" (Kim, Lee, Ham, ICCV 2021), section 4.1 and the authors' published training
code; "Network Quantization with Element-wise Gradient Scaling" (Lee, Kim, Ham, CVPR 2021) for ImageNet.

Runs of earlier versions, whose recipes had fewer fields.

Where a recipe comes from: a published name, a TOML file, or the dataclass itself.

Fields of a recipe as texts, as a command line has them: `lr=0.1`, `features=layer1,layer2`.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from daqconvert.errors import TrainingError, nearest
from daqconvert.training.recipes.recipe import Recipe, check_field, check_names

_PUBLISHED: dict[str, Any] = {
    "momentum": 0.9, "weight_decay": 1e-4, "schedule": "cosine", "batch_size": 256, "distill": 0.0,
    "calibration_batches": 1, "calibration_method": "std", "final_a_sigma": 0.0,
}  # fmt: skip

RECIPES: dict[str, Recipe] = {
    "quick": Recipe(),
    "short": Recipe(
        "short",
        epochs=10,
        batch_size=256,
        lr=0.03,
        quantizer_lr=1e-4,
        features=("auto",),
        reconstruct=100,
        reconstruct_batches=16,
    ),
    "fewshot": Recipe(
        "fewshot",
        epochs=4,
        batch_size=25,
        optimizer="adam",
        lr=5e-3,
        lr_unit="size",
        weight_decay=0.0,
        quantizer_lr=5e-3,
        distill=1.0,
        temperature=1.0,
        features=("auto",),
        feature_weight=10.0,
        ema=0.98,
        final_a_sigma=0.0,
        crop_scale=0.35,
        batch_norm="freeze",
        reconstruct=300,
        reestimate=8,
    ),
    "paper-cifar10": Recipe("paper-cifar10", epochs=400, lr=0.1, quantizer_lr=1e-4, **_PUBLISHED),
    "paper-imagenet": Recipe("paper-imagenet", epochs=100, lr=0.01, quantizer_lr=1e-5, **_PUBLISHED),
}


BEFORE: dict[str, Any] = {
    "final_w_sigma": 0.0,
    "final_a_sigma": 0.0,
    "final_sigma_bits": 2,
    "gptq": 0,
    "lr_unit": "absolute",
    "reconstruct": 0,
    "reconstruct_batches": 32,
}
"""What a run had that was written before a field was there."""


def completed(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a run's recipe with those that it was written before.

    Args:
        fields: As they were written.

    Example:
        >>> completed({"final_a_sigma": 2.0})["final_sigma_bits"], completed({})["final_sigma_bits"]
        (2, 1)
    """
    sharpened = fields.get("final_w_sigma") or fields.get("final_a_sigma")
    bits = {} if sharpened else {"final_sigma_bits": 1}  # where nothing sharpened, today's default is as true
    return {**BEFORE, **bits, **fields}


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
    check_names(values, f"recipe {path}")
    return dataclasses.replace(RECIPES[base], **{"name": path.name, **values})


_TYPES = {field.name: str(field.type) for field in dataclasses.fields(Recipe)}
_WORDS: dict[str, Any] = {"none": None, "true": True, "false": False}


def parse_overrides(texts: Iterable[str]) -> dict[str, Any]:
    """Return the fields that texts `FIELD=VALUE` change, each checked, for `recipe(name, **overrides)`.

    Numbers, `true` and `false` are written as in TOML, `none` is None, texts go without quotes. Names are separated by
    commas; they and the stages of `progressive` may also be a TOML array.

    Args:
        texts: One per field.

    Raises:
        TrainingError: If one has another form, names no field (says the nearest) or a value the field cannot take.

    Example:
        >>> parse_overrides(["lr=0.1", "features=layer1,layer2", "progressive=[[0.2, 4, 4]]"])
        {'lr': 0.1, 'features': ('layer1', 'layer2'), 'progressive': ((0.2, 4, 4),)}
    """
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        name = name.strip()
        if not equals:
            raise TrainingError(f"override {text!r}: expected FIELD=VALUE, as epochs=10.")
        check_names([name], f"override {text!r}")
        if name in found:
            raise TrainingError(f"override {text!r}: {name} is given twice. Leave one of them out.")
        found[name] = check_field(name, _value(_TYPES[name], value.strip()), f"override {text!r}")
    return found


def _value(kind: str, text: str) -> Any:
    """A text as a value of a field's type; the text itself where it is none, for the field's check to refuse."""
    if kind == "str":
        return text
    if kind.startswith("tuple") and not text.startswith("["):
        return [item.strip() for item in text.split(",")] if text else []
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text
