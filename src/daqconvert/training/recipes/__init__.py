"""Recipes: everything that decides a training run besides model and data, as one frozen dataclass."""

from daqconvert.training.recipes.named import RECIPES, completed, parse_overrides, recipe
from daqconvert.training.recipes.recipe import FIELDS, Recipe

__all__ = ["FIELDS", "RECIPES", "Recipe", "completed", "parse_overrides", "recipe"]
