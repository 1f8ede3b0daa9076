"""Every field of a recipe says what it means."""

from __future__ import annotations

import inspect

from daqconvert.training import Recipe
from daqconvert.training.recipes import FIELDS


def test_every_field_has_its_meaning():
    shown = inspect.getdoc(Recipe)
    for name, field in FIELDS.items():
        assert field.metadata["meaning"].endswith(".")
        assert f"    {name}: {field.metadata['meaning'][:40]}" in shown
