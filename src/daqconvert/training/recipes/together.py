"""What fields of a recipe say together: an option that can have no effect is an error, never a shrug."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from daqconvert.training.recipes.recipe import Recipe

_GRADIENT_STEPS = re.compile("sgd|momentum|nesterov")
"""In timm's names of optimizers: those whose step is the gradient, or its running mean, times the rate."""


def contradiction(recipe: Recipe) -> str:
    """Return what does not go together in a recipe, and what to change; `""` where all does.

    Args:
        recipe: With each field valid by itself.
    """
    if recipe.features and not recipe.feature_weight:
        return "features: have no effect with feature_weight=0.0. Set feature_weight=1.0, or leave features out"
    for field in ("optimizer", "quantizer_optimizer"):
        name = getattr(recipe, field)
        if recipe.lr_unit == "size" and _GRADIENT_STEPS.search(name):
            return (
                f'{field}: a step of {name!r} is as large as the gradient, so lr_unit="size" cannot say its share of '
                f'a parameter. Set {field}="adam", or lr_unit="absolute"'
            )
    if recipe.label_smoothing and recipe.distill == 1.0:
        return (
            "label_smoothing: has no effect with distill=1.0, for there is no cross entropy. Set label_smoothing=0.0"
        )
    if recipe.batch_norm == "freeze" and recipe.batch_norm_freeze_at < 1.0:
        return 'batch_norm_freeze_at: has no effect with batch_norm="freeze". Set batch_norm="train"'
    if recipe.reestimate and recipe.batch_norm_freeze_at < 1.0:
        return (
            "reestimate: takes statistics anew that batch_norm_freeze_at keeps. Set reestimate=0, or "
            'batch_norm_freeze_at=1.0; with batch_norm="freeze" it takes them once, before the first step'
        )
    if recipe.progressive and recipe.freeze_bounds_at < recipe.progressive[-1][0]:
        return (
            f"freeze_bounds_at: {recipe.freeze_bounds_at:g} is before the end of the last stage of progressive, "
            f"{recipe.progressive[-1][0]:g}, so no bound would learn its final width. Set it to that or later"
        )
    return ""
