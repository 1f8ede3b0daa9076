"""Where a recipe comes from: a published name, a TOML file, or the dataclass itself."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path
from typing import Any

from daqconvert.errors import TrainingError, nearest
from daqconvert.training.recipes.published import RECIPES
from daqconvert.training.recipes.recipe import Recipe, check_names


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
