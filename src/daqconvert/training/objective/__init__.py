"""What training minimizes.

    loss = (1 - distill) * hard(z, y) + distill * T^2 * KL(softmax(z_teacher / T) || softmax(z / T))

`hard` is the cross entropy or the user's `loss_fn`; a part with weight 0 is not computed. The teacher is the user's,
or the model itself as it was before the first step, in float.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from daqconvert.batches import model_device
from daqconvert.errors import TrainingError
from daqconvert.layers.site import QuantizedSite
from daqconvert.training.checkpoint import digest
from daqconvert.training.loaders import Inputs
from daqconvert.training.losses import LossFn, cross_entropy, distillation, logits_of
from daqconvert.training.recipes import Recipe

NO_TEACHER, OWN_TEACHER = "none", "own"


@dataclass
class Objective:
    """The loss of a model on a batch.

    Attributes:
        recipe: Gives `distill`, `temperature` and `label_smoothing`.
        loss_fn: Loss of `(outputs, target)` instead of the cross entropy, or None.
        teacher: In evaluation mode, or None; set before the first call where `distill` is not 0.
    """

    recipe: Recipe
    loss_fn: LossFn | None = None
    teacher: nn.Module | None = None

    @property
    def needs_target(self) -> bool:
        """Whether the loss uses targets."""
        return self.recipe.distill < 1.0

    def __call__(self, model: nn.Module, inputs: Inputs, target: Any) -> tuple[Tensor, Any]:
        """Return the loss, a scalar that carries gradients, and the model's outputs.

        Args:
            model: The model in training.
            inputs: Positional and keyword arguments.
            target: Or None where no target is needed.

        Raises:
            DataError: If the target does not fit the outputs.
            TrainingError: If outputs are not one tensor of logits and no `loss_fn` was given.
        """
        args, kwargs = inputs
        outputs = model(*args, **kwargs)
        distill, parts = self.recipe.distill, []
        if distill < 1.0:
            parts.append((1.0 - distill) * self._hard(outputs, target))
        if distill > 0.0:
            assert self.teacher is not None  # set by start()
            with torch.no_grad():
                wanted = logits_of(self.teacher(*args, **kwargs), "the teacher")
            parts.append(distill * distillation(logits_of(outputs), wanted, self.recipe.temperature))
        return sum(parts[1:], parts[0]), outputs

    def _hard(self, outputs: Any, target: Any) -> Tensor:
        if self.loss_fn is None:
            return cross_entropy(logits_of(outputs), target, self.recipe.label_smoothing)
        loss = self.loss_fn(outputs, target)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            found = (
                f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            )
            raise TrainingError(f"loss_fn: expected it to return a scalar tensor, the batch's mean; found {found}.")
        return loss


def check_teacher(teacher: nn.Module | None, qmodel: nn.Module, recipe: Recipe) -> None:
    """Raise `TrainingError` if a teacher was passed that cannot teach this model.

    Args:
        teacher: What the user passed, or None.
        qmodel: The model to train.
        recipe: Says whether there is a distillation at all.

    Raises:
        TrainingError: If it would have no effect, shares parameters with the model, or is on another device.
    """
    if teacher is None:
        return
    if recipe.distill == 0.0:
        raise TrainingError(f"teacher: has no effect, for recipe {recipe.name!r} has distill=0.0. Pass distill=0.5.")
    own = {id(parameter) for parameter in qmodel.parameters()}
    if any(id(parameter) in own for parameter in teacher.parameters()):
        raise TrainingError(
            "teacher: shares parameters with the model in training. Pass the float model, or none: finetune then "
            "takes a float copy of the model itself."
        )
    ours, theirs = model_device(qmodel), model_device(teacher)
    if ours != theirs:
        raise TrainingError(f"teacher: is on {theirs}, the model on {ours}. Call teacher.to({str(ours)!r}).")


def teacher_kind(teacher: nn.Module | None, recipe: Recipe) -> str:
    """Return what a checkpoint notes of the teacher: `"none"`, `"own"`, or the SHA-256 of the one passed."""
    if recipe.distill == 0.0:
        return NO_TEACHER
    if teacher is None:
        return OWN_TEACHER
    return digest({key: value for key, value in teacher.state_dict().items() if isinstance(value, Tensor)})


def float_teacher(qmodel: nn.Module) -> nn.Module:
    """Return a copy of a quantized model that computes in float, in evaluation mode and without gradients."""
    teacher = copy.deepcopy(qmodel)
    for module in teacher.modules():
        if isinstance(module, QuantizedSite):
            module.enabled = False
    return teacher.eval().requires_grad_(False)
