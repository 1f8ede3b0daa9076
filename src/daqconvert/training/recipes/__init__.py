"""Recipes: everything that decides a training run besides model and data, as one frozen dataclass."""

from daqconvert.training.recipes.finding import RECIPES, recipe
from daqconvert.training.recipes.recipe import Recipe

__all__ = ["RECIPES", "Recipe", "recipe"]
