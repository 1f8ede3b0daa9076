"""Fields of a recipe as texts, as a command line has them: `lr=0.1`, `features=layer1,layer2`."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Iterable
from typing import Any

from daqconvert.errors import TrainingError
from daqconvert.training.recipes.recipe import Recipe, check_field, check_names

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
