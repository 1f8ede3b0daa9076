"""Training: recipes, the verbs `finetune` and `evaluate`, checkpoints and resume."""

from daqconvert.training.checkpoint import load_weights
from daqconvert.training.evaluation import EvalResult, evaluate
from daqconvert.training.finetuning import FinetuneResult, finetune
from daqconvert.training.recipes import RECIPES, Recipe, recipe

__all__ = ["RECIPES", "EvalResult", "FinetuneResult", "Recipe", "evaluate", "finetune", "load_weights", "recipe"]
