"""The recipe itself: its fields, in groups, each checked when it is made.

Learning rates are per optimizer step and follow the schedule from step 0; `epochs` counts passes over the loader. A
share of a run is a number from 0 to 1, of its steps.

What fields of a recipe say together: an option that can have no effect is an error, never a shrug.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from daqconvert.calibration.observers import METHODS
from daqconvert.errors import TrainingError, nearest
from daqconvert.spec.toml import toml_text
from daqconvert.training.recipes.fields import (
    Check,
    below_one,
    choice,
    count,
    limit,
    names,
    nonnegative,
    positive,
    share,
    stages,
    text,
    yes_or_no,
)


@dataclass(frozen=True)
class Recipe:
    """How to train: optimizers, schedule, loss, calibration, seed. The defaults are the recipe `quick`.

    Attributes:
        name: Where the recipe comes from, for messages.
        epochs: Passes over the training loader.
        batch_size: For whoever makes the loaders, as the command line does; a loader that is passed keeps its own.
        accumulate: Batches whose gradients are averaged before one optimizer step.
        precision: `"no"`, `"bf16"` or `"fp16"`: autocast of the forward; `"launcher"` is what `accelerate launch`
            was told, and `"no"` without it.
        optimizer: Of everything that is not a quantizer's: a name of timm's factory, as `"sgd"` or `"adamw"`.
        lr: Its learning rate.
        lr_unit: What both learning rates are in: `"absolute"`, or `"size"`, each parameter's own - a weight's
            quantization step, a tenth of anything else - for optimizers whose steps do not depend on the gradient's.
        momentum: Of optimizers that have one.
        weight_decay: Of the weights; quantizers have `quantizer_weight_decay`.
        decay: Which of them decay: `"all"` as published, or `"weights"`, not biases and norms.
        no_decay: Names, globs or `re:` patterns of parameters without weight decay.
        quantizer_optimizer: Of bounds, steps and `output_scale`: a name of timm's factory.
        quantizer_lr: Its learning rate.
        quantizer_weight_decay: Its weight decay.
        clip_grad: Largest norm of the gradient, or None (0) for no limit.
        schedule: `"cosine"` to 0, `"linear"` to 0, `"step"`, or `"constant"`; both learning rates, every step.
        warmup_steps: Steps over which both learning rates rise linearly first.
        step_epochs: Epochs between two falls of the `"step"` schedule.
        step_factor: What each of them multiplies the rates with.
        label_smoothing: Of the cross entropy.
        mixup: Alpha of timm's mixup, 0 for none.
        cutmix: Alpha of timm's cutmix, 0 for none.
        augment: timm's automatic augmentation, as `"rand-m9-mstd0.5"`; `""` for none. Like the next three for whoever
            makes the loaders.
        color_jitter: Strength of timm's color jitter.
        random_erasing: Probability of timm's random erasing.
        crop_scale: Smallest share of the image that a random crop takes.
        distill: Weight 0..1 of the distillation loss, towards the float model; 1 needs no targets.
        temperature: Of the distillation's softmax.
        features: Names or globs of modules whose outputs are drawn towards the teacher's; `"auto"` is every block.
        feature_weight: Weight of that loss.
        ema: Decay of an average of the weights that is evaluated and kept, 0 for none.
        ema_warmup: Whether that decay rises to its value over the first steps.
        batch_norm: `"train"`, or `"freeze"` to keep the running statistics and use them.
        batch_norm_freeze_at: Share of the run after which `"train"` becomes `"freeze"`; 1 is never.
        gptq: Training batches from which GPTQ chooses the weights' levels, once, before the first step; 0 leaves them
            the nearest.
        reconstruct: Steps that each block trains on its own output, one block after the other, before the first step.
        reconstruct_batches: Training batches from which it does, of several epochs where one has fewer.
        reestimate: Training batches from which batch norms take their statistics anew before every evaluation; where
            `batch_norm` is `"freeze"`, once before the first step.
        freeze_bounds_at: Share of the run after which the quantizers' parameters stay as they are; 1 is never.
        progressive: Stages `(until, w_bits, a_bits)`: until that share of the run no site has fewer bits than these.
        final_w_sigma: Kernel width that DAQ's rounding of weights of few bits has at the end of the run; from the
            model's own it gets there evenly, so that a flat slope becomes a peaked one. 0 leaves it.
        final_a_sigma: Likewise of inputs of few bits.
        final_sigma_bits: How many bits are few for those two.
        patience: Epochs without a better validation result after which training stops, 0 for never.
        oscillation: What is done about weights that jump between two levels: `"log"` their share, `"freeze"` them,
            or `"off"`.
        oscillation_threshold: Frequency of jumps, per step, from which a weight oscillates.
        explode: The loss has exploded when it is this many times its running mean; 0 never looks.
        checkpoint_steps: Steps between two checkpoints besides those at the ends of epochs, 0 for none.
        keep: Checkpoints that are kept, the last among them.
        calibration_batches: Training batches that set bounds which were not calibrated before.
        calibration_method: As `calibrate` takes it.
        seed: Of shuffling, augmentation and dropout.

    Example:
        >>> Recipe(epochs=2).schedule
        'cosine'
    """

    name: str = "quick"
    epochs: int = 5
    batch_size: int = 64
    accumulate: int = 1
    precision: str = "launcher"
    optimizer: str = "sgd"
    lr: float = 0.02
    lr_unit: str = "absolute"
    momentum: float = 0.9
    weight_decay: float = 1e-4
    decay: str = "all"
    no_decay: tuple[str, ...] = ()
    quantizer_optimizer: str = "adam"
    quantizer_lr: float = 1e-3
    quantizer_weight_decay: float = 0.0
    clip_grad: float | None = None
    schedule: str = "cosine"
    warmup_steps: int = 0
    step_epochs: int = 30
    step_factor: float = 0.1
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    augment: str = ""
    color_jitter: float = 0.0
    random_erasing: float = 0.0
    crop_scale: float = 0.08
    distill: float = 0.5
    temperature: float = 2.0
    features: tuple[str, ...] = ()
    feature_weight: float = 1.0
    ema: float = 0.0
    ema_warmup: bool = True
    batch_norm: str = "train"
    batch_norm_freeze_at: float = 1.0
    gptq: int = 0
    reconstruct: int = 0
    reconstruct_batches: int = 32
    reestimate: int = 0
    freeze_bounds_at: float = 1.0
    progressive: tuple[tuple[float, int, int], ...] = ()
    final_w_sigma: float = 0.0
    final_a_sigma: float = 2.0
    final_sigma_bits: int = 1
    patience: int = 0
    oscillation: str = "log"
    oscillation_threshold: float = 0.02
    explode: float = 10.0
    checkpoint_steps: int = 0
    keep: int = 2
    calibration_batches: int = 8
    calibration_method: str = "mse"
    seed: int = 0

    def __post_init__(self) -> None:
        for field in FIELDS:
            value = check_field(field, getattr(self, field), f"recipe {self.name!r}")
            object.__setattr__(self, field, value)
        problem = contradiction(self)
        if problem:
            raise TrainingError(f"recipe {self.name!r}: {problem}.")

    def replace(self, **changes: Any) -> Recipe:
        """Return a copy with some fields changed.

        Args:
            **changes: Field name -> value.

        Raises:
            TrainingError: If there is no such field or it cannot take that value (names the nearest valid one), or
                fields do not go together.
        """
        check_names(changes, f"recipe {self.name!r}")
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dict of plain values, as JSON gives them back."""
        found: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return found

    def to_toml(self) -> str:
        """Return the recipe as TOML that `recipe` reads back.

        Example:
            >>> Recipe(epochs=2).to_toml().splitlines()[:2]
            ['name = "quick"', 'epochs = 2']
        """
        return toml_text({key: 0 if value is None else value for key, value in self.to_dict().items()})


FIELDS = tuple(field.name for field in dataclasses.fields(Recipe))


def check_field(field: str, value: Any, where: str) -> Any:
    """Return the value of one field as a recipe stores it.

    Args:
        field: Its name.
        value: As the user wrote it.
        where: The recipe, for the message.

    Raises:
        TrainingError: If the field cannot take it.
    """
    try:
        return _CHECKS[field](value)
    except ValueError as error:
        raise TrainingError(f"{where}: {field}: expected {error}; found {value!r}.") from None


def check_names(values: Iterable[str], where: str) -> None:
    """Raise `TrainingError` if there is a name that is not a field's.

    Args:
        values: The names.
        where: The recipe, for the message.

    Raises:
        TrainingError: Naming the nearest field.
    """
    for name in values:
        if name not in FIELDS:
            raise TrainingError(f"{where}: {name!r} is not a field of a recipe.{nearest(name, FIELDS)}")


_CHECKS: dict[str, Check] = {
    "name": text,
    "epochs": count(1),
    "batch_size": count(1),
    "accumulate": count(1),
    "precision": choice("launcher", "no", "bf16", "fp16"),
    "optimizer": text,
    "lr": nonnegative,
    "lr_unit": choice("absolute", "size"),
    "momentum": below_one,
    "weight_decay": nonnegative,
    "decay": choice("all", "weights"),
    "no_decay": names,
    "quantizer_optimizer": text,
    "quantizer_lr": nonnegative,
    "quantizer_weight_decay": nonnegative,
    "clip_grad": limit,
    "schedule": choice("cosine", "linear", "step", "constant"),
    "warmup_steps": count(0),
    "step_epochs": count(1),
    "step_factor": share,
    "label_smoothing": below_one,
    "mixup": nonnegative,
    "cutmix": nonnegative,
    "augment": text,
    "color_jitter": nonnegative,
    "random_erasing": share,
    "crop_scale": share,
    "distill": share,
    "temperature": positive,
    "features": names,
    "feature_weight": nonnegative,
    "ema": below_one,
    "ema_warmup": yes_or_no,
    "batch_norm": choice("train", "freeze"),
    "batch_norm_freeze_at": share,
    "gptq": count(0),
    "reconstruct": count(0),
    "reconstruct_batches": count(1),
    "reestimate": count(0),
    "freeze_bounds_at": share,
    "progressive": stages,
    "final_w_sigma": nonnegative,
    "final_a_sigma": nonnegative,
    "final_sigma_bits": count(1),
    "patience": count(0),
    "oscillation": choice("log", "freeze", "off"),
    "oscillation_threshold": share,
    "explode": nonnegative,
    "checkpoint_steps": count(0),
    "keep": count(1),
    "calibration_batches": count(1),
    "calibration_method": choice(*METHODS),
    "seed": count(0),
}


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
