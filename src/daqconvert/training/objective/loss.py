"""The loss of a batch: the weighted sum of its parts, and mixed inputs if the recipe says so.

Mixup and cutmix are timm's: two images become one, and so do their targets. The weight of mixup, or the box of cutmix,
is drawn once for a batch, from NumPy's global generator. The i-th input of an even batch is mixed with the i-th from
its end. The last input of an odd batch stays as it is.

Sources: "mixup: Beyond Empirical Risk Minimization" (Zhang, Cisse, Dauphin, Lopez-Paz, ICLR 2018),
https://arxiv.org/abs/1710.09412; "CutMix" (Yun et al., ICCV 2019), https://arxiv.org/abs/1905.04899; timm,
`timm.data.Mixup`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from daqconvert.errors import DataError, TrainingError
from daqconvert.training.batching.loaders import Inputs
from daqconvert.training.losses import LossFn, checked_target, distillation, logits_of, mean_cross_entropy
from daqconvert.training.objective.features import Collector, called_alike, feature_loss, feature_names, optional_names
from daqconvert.training.objective.teacher import is_taught
from daqconvert.training.recipes import Recipe


@dataclass
class Objective:
    """The loss of a model on a batch.

    Attributes:
        recipe: Recipe with the weights of the parts, `temperature`, `label_smoothing`, `mixup`, `cutmix` and
            `features`.
        loss_fn: Loss of `(outputs, target)` instead of the cross entropy, or None.
        teacher: Teacher in evaluation mode, or None; set before the first call if `distill` is not 0 or there are
            features.
        last_parts: The parts that the last call's loss had, of `hard`, `distill` and `features`; each is a scalar
            tensor without its weight and without a gradient.

    Raises:
        TrainingError: If `label_smoothing` has no effect.
    """

    recipe: Recipe
    loss_fn: LossFn | None = None
    teacher: nn.Module | None = None
    last_parts: dict[str, Tensor] = field(default_factory=dict, init=False)
    _collectors: list[Collector] = field(default_factory=list, init=False, repr=False)
    _optional: set[str] = field(default_factory=set, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.loss_fn is not None and self.recipe.label_smoothing:
            raise TrainingError("label_smoothing: has no effect with a loss_fn. Pass label_smoothing=0.0.")

    @property
    def needs_target(self) -> bool:
        """Whether the loss uses targets."""
        return self.recipe.distill < 1.0

    def __call__(self, model: nn.Module, inputs: Inputs, target: Any) -> tuple[Tensor, Any]:
        """Return the loss, a scalar that carries gradients, and the model's outputs.

        If the recipe says so and the model is in training mode, inputs are mixed; the teacher sees the mixed ones.

        Args:
            model: The model in training.
            inputs: Positional and keyword arguments.
            target: Target of the batch, or None if none is needed.

        Raises:
            DataError: If the target does not fit the outputs, or the inputs cannot be mixed.
            TrainingError: If outputs are not one tensor of logits and no `loss_fn` was given, or a feature is missing.
        """
        recipe, mixture = self.recipe, None
        if model.training and (recipe.mixup or recipe.cutmix):
            mixture = mixed(inputs, recipe)
            inputs = mixture.inputs
        with self._recording(model) as collected:
            outputs = model(*inputs[0], **inputs[1])
            with torch.no_grad():
                taught = self.teacher(*inputs[0], **inputs[1]) if self.teacher and is_taught(recipe) else None
        parts, weights = {}, {}
        if recipe.distill < 1.0:
            parts["hard"], weights["hard"] = self._hard(outputs, target, mixture), 1.0 - recipe.distill
        if recipe.distill > 0.0:
            wanted = logits_of(taught, "the teacher")
            parts["distill"] = distillation(logits_of(outputs), wanted, recipe.temperature)
            weights["distill"] = recipe.distill
        if collected:
            ours, theirs = (collector.take() for collector in collected)
            names = [n for n in collected[0].names if n not in self._optional or called_alike(ours, theirs, n)]
            if names:
                parts["features"] = feature_loss(ours, theirs, names)
                weights["features"] = recipe.feature_weight
        self.last_parts = {name: part.detach() for name, part in parts.items()}
        weighed = [weights[name] * part for name, part in parts.items()]
        return sum(weighed[1:], weighed[0]), outputs

    def close(self) -> None:
        """Remove the hooks that collect features; a later call attaches them again."""
        for collector in self._collectors:
            collector.close()
        self._collectors = []

    @contextmanager
    def _recording(self, model: nn.Module) -> Iterator[list[Collector]]:
        """Record the features of student and teacher; without features there is no collector."""
        if self.recipe.features and not self._collectors:
            assert self.teacher is not None  # set before the first step
            student = unwrapped(model)
            theirs = dict(self.teacher.named_modules())
            self._optional = optional_names(self.recipe, student)
            names = [n for n in feature_names(self.recipe, student) if n in theirs or n not in self._optional]
            self._collectors = [Collector(student, names), Collector(self.teacher, names)]
        for collector in self._collectors:
            collector.start()
        try:
            yield self._collectors
        finally:
            for collector in self._collectors:
                collector.recording = False

    def _hard(self, outputs: Any, target: Any, mixture: Mixture | None) -> Tensor:
        """Return the cross entropy, or what the user's `loss_fn` gives."""
        if mixture is not None:
            target = mixture.target(logits_of(outputs), target, own_loss=self.loss_fn is not None)
        if self.loss_fn is None:
            logits, smoothing = logits_of(outputs), self.recipe.label_smoothing
            known = target if mixture is not None else checked_target(logits, target)
            return mean_cross_entropy(logits, known, smoothing)
        loss = self.loss_fn(outputs, target)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            found = (
                f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            )
            raise TrainingError(f"loss_fn: expected it to return a scalar tensor, the batch's mean; found {found}.")
        return loss


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside the wrappers of `DistributedDataParallel` and `torch.compile`."""
    while isinstance(model, nn.parallel.DistributedDataParallel) or hasattr(model, "_orig_mod"):
        model = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model._orig_mod  # type: ignore[assignment]
    return model


@dataclass(frozen=True)
class Mixture:
    """Inputs that were mixed, and how.

    Attributes:
        inputs: Positional and keyword arguments.
        shares: `(N, N)`; row i holds the shares that all targets have in the mixed target i.
    """

    inputs: Inputs
    shares: Tensor

    def target(self, logits: Tensor, target: Any, own_loss: bool = False) -> Tensor:
        """Return the mixed targets as probabilities, shape and dtype of the logits `(N, C)`.

        For a loss of the user's own, targets of the logits' shape are any numbers, such as several labels an input.

        Raises:
            DataError: If the target is neither class numbers `(N,)` nor probabilities `(N, C)`, or a class number is
                not one of the model's.
        """
        free = own_loss and isinstance(target, Tensor) and target.is_floating_point() and target.shape == logits.shape
        found = target if free else checked_target(logits, target)
        if logits.dim() != 2:
            raise DataError(f"mixup and cutmix: expected logits (N, C), found shape {tuple(logits.shape)}.")
        if not found.is_floating_point():
            if found.numel() and not 0 <= int(found.min()) <= int(found.max()) < logits.shape[1]:
                raise DataError(
                    f"mixup and cutmix: expected targets 0 to {logits.shape[1] - 1}, found {int(found.min())} to "
                    f"{int(found.max())}."
                )
            found = F.one_hot(found, logits.shape[1])
        return self.shares.to(logits.dtype) @ found.to(logits.dtype)


def mixed(inputs: Inputs, recipe: Recipe) -> Mixture:
    """Return a batch, its inputs mixed by `mixup` and `cutmix` of the recipe; the caller's tensors are not changed.

    Raises:
        DataError: If the inputs are not one floating-point tensor: `(N, ...)`, or images `(N, C, H, W)` with cutmix.

    Example:
        >>> mixture = mixed(((torch.ones(3, 1, 2, 2),), {}), Recipe(mixup=1.0))
        >>> mixture.shares.sum(dim=1).tolist()
        [1.0, 1.0, 1.0]
    """
    from timm.data import Mixup

    args, kwargs = inputs
    places: list[Any] = [
        *((i, value) for i, value in enumerate(args) if isinstance(value, Tensor)),
        *((key, value) for key, value in kwargs.items() if isinstance(value, Tensor)),
    ]
    x = places[0][1] if len(places) == 1 else None
    if x is None or not x.is_floating_point() or x.dim() < (4 if recipe.cutmix else 1):
        form = "images (N, C, H, W)" if recipe.cutmix else "one floating-point tensor (N, ...)"
        shapes = ", ".join(f"{tuple(value.shape)} of {value.dtype}" for _, value in places) or "no tensor"
        raise DataError(f"mixup and cutmix: expected {form} as the model's only input, found {shapes}.")
    even = len(x) // 2 * 2
    shares = torch.eye(len(x), device=x.device)
    if even:
        timms = Mixup(recipe.mixup, recipe.cutmix, label_smoothing=0.0, num_classes=even, multi_label=True)
        front, among = timms(x[:even].clone(), torch.eye(even, device=x.device))
        x = torch.cat([front, x[even:]]) if even < len(x) else front
        shares[:even, :even] = among
    place = places[0][0]
    if isinstance(place, int):
        return Mixture(((*args[:place], x, *args[place + 1 :]), kwargs), shares)
    return Mixture((args, {**kwargs, place: x}), shares)
