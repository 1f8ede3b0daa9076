"""Where a recipe comes from: a name, a TOML file, texts `FIELD=VALUE` of a command line, a run of an earlier version.

References for the published recipes: "Distance-aware Quantization" (Kim, Lee, Ham, ICCV 2021), section 4.1 and the
authors' published training code; "Network Quantization with Element-wise Gradient Scaling" (Lee, Kim, Ham, CVPR 2021)
for ImageNet.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from daqconvert.errors import TrainingError, nearest
from daqconvert.training.recipes.recipe import FIELDS, Recipe, check_field, check_names

_PUBLISHED: dict[str, Any] = {
    "momentum": 0.9, "weight_decay": 1e-4, "schedule": "cosine", "batch_size": 256, "distill": 0.0,
    "calibration_batches": 1, "calibration_method": "std", "final_a_sigma": 0.0,
}  # fmt: skip

RECIPES: dict[str, Recipe] = {
    "quick": Recipe(),
    "short": Recipe(  # about ten epochs over many labelled images, at two bits
        "short",
        epochs=10,
        batch_size=256,
        lr=0.03,
        quantizer_lr=1e-4,
        features=("auto",),
        reconstruct=100,
        reconstruct_batches=16,
    ),
    "fewshot": Recipe(  # a few hundred images, which need no labels
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


def recipe(source: str | Path | Recipe = "quick", **overrides: Any) -> Recipe:
    """Return a recipe by name, from a TOML file, or as given, with some fields changed.

    Args:
        source: A name in `RECIPES`, the path of a TOML file (`base = "quick"` and any field), or a `Recipe`.
        **overrides: Fields to change.

    Raises:
        TrainingError: If there is no such recipe, file or field; the message says the nearest valid one.

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


def parse_overrides(texts: Iterable[str]) -> dict[str, Any]:
    """Return the fields that texts `FIELD=VALUE` change, each checked, for `recipe(name, **overrides)`.

    Numbers, `true` and `false` are written as in TOML, `none` is None, texts go without quotes. Names are separated by
    commas; they and the stages of `progressive` may also be a TOML array.

    Args:
        texts: One text for each field.

    Raises:
        TrainingError: If a text has another form, no field has its name (the message says the nearest), or the field
            cannot take its value.

    Example:
        >>> parse_overrides(["lr=0.1", "features=layer1,layer2", "progressive=[[0.2, 4, 4]]"])
        {'lr': 0.1, 'features': ('layer1', 'layer2'), 'progressive': ((0.2, 4, 4),)}
    """
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        name = name.strip()
        where = f"override {text!r}"
        if not equals:
            raise TrainingError(f"{where}: expected FIELD=VALUE, as epochs=10.")
        check_names([name], where)
        if name in found:
            raise TrainingError(f"{where}: {name} is given twice. Leave one of them out.")
        found[name] = check_field(name, FIELDS[name].metadata["kind"].parsed(value.strip()), where)
    return found


BEFORE: dict[str, Any] = {
    name: field.metadata["before"] for name, field in FIELDS.items() if field.metadata["before"] is not None
}
"""For each field that was added after the first version: the value that stands for what earlier runs did."""


def completed(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a run's recipe as they were written, and those that were added since, as `BEFORE` has them.

    Example:
        >>> completed({"final_a_sigma": 2.0})["final_sigma_bits"], completed({})["final_sigma_bits"]
        (2, 1)
    """
    sharpened = fields.get("final_w_sigma") or fields.get("final_a_sigma")
    bits = {} if sharpened else {"final_sigma_bits": 1}  # no kernel width moved, so the present default says the same
    return {**BEFORE, **bits, **fields}
