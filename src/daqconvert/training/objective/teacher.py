"""The teacher of a run: none, a float copy of the model itself, or a model that the user passes."""

from __future__ import annotations

from torch import Tensor, nn

from daqconvert.batches import model_device
from daqconvert.errors import TrainingError
from daqconvert.training.checkpoint import digest
from daqconvert.training.objective.features import feature_names, optional_names
from daqconvert.training.recipes import Recipe

NO_TEACHER, OWN_TEACHER = "none", "own"


def is_taught(recipe: Recipe) -> bool:
    """Return whether a recipe's loss has a part that a teacher gives: `distill` or `features`."""
    return recipe.distill > 0.0 or bool(recipe.features)


def check_teacher(teacher: nn.Module | None, qmodel: nn.Module, recipe: Recipe) -> None:
    """Raise `TrainingError` if the teacher that was passed, or the names of features, cannot teach this model.

    Args:
        teacher: Teacher that the user passed, or None.
        qmodel: The model to train.
        recipe: Recipe, which says whether there is a teacher at all.

    Raises:
        TrainingError: If the teacher would have no effect, shares parameters with the model, or is on another device;
            if `features` names no module of the model, or one that the teacher does not have.
    """
    names = feature_names(recipe, qmodel)
    if teacher is None:
        return
    if not is_taught(recipe):
        raise TrainingError(
            f"teacher: has no effect, for recipe {recipe.name!r} has distill=0.0 and no features. Pass distill=0.5."
        )
    own = {id(parameter) for parameter in qmodel.parameters()}
    if any(id(parameter) in own for parameter in teacher.parameters()):
        raise TrainingError(
            "teacher: shares parameters with the model in training. Pass the float model, or none: finetune then "
            "takes a float copy of the model itself."
        )
    theirs = dict(teacher.named_modules())
    optional = optional_names(recipe, qmodel)
    missing = [name for name in names if name not in theirs and name not in optional]
    if missing:
        raise TrainingError(
            f"features: {missing[0]!r} is a module of the model, but not of the teacher. Name modules that both "
            "have, or pass no teacher: finetune then takes a float copy of the model itself."
        )
    ours, place = model_device(qmodel), model_device(teacher)
    if ours != place:
        raise TrainingError(f"teacher: is on {place}, the model on {ours}. Call teacher.to({str(ours)!r}).")


def teacher_kind(teacher: nn.Module | None, recipe: Recipe) -> str:
    """Return how a checkpoint names the teacher: `"none"`, `"own"`, or the SHA-256 of the one passed."""
    if not is_taught(recipe):
        return NO_TEACHER
    if teacher is None:
        return OWN_TEACHER
    return digest({key: value for key, value in teacher.state_dict().items() if isinstance(value, Tensor)})
