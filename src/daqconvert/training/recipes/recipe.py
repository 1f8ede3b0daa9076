"""The recipe itself: its fields in groups, and which of their values contradict each other.

Learning rates are per optimizer step and follow the schedule from step 0; `epochs` counts passes over the loader. A
share of a run is a number from 0 to 1: a share of its optimizer steps.
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
    Choice,
    Flag,
    Integer,
    Limit,
    Names,
    Number,
    Stages,
    Text,
    setting,
    with_meanings,
)


@with_meanings
@dataclass(frozen=True)
class Recipe:
    """How to train: optimizers, schedule, loss, calibration, seed. The defaults are the recipe `quick`.

    Example:
        >>> Recipe(epochs=2).schedule
        'cosine'
    """

    name: str = setting("quick", "Name of the recipe, or of the file that it was read from, for messages.", Text())

    # how long, and in what portions
    epochs: int = setting(5, "Passes over the training loader.", Integer(1))
    batch_size: int = setting(
        64, "Inputs in a batch of the loaders that the command line makes; a loader that you pass keeps its own.",
        Integer(1),
    )  # fmt: skip
    accumulate: int = setting(1, "Batches whose gradients are averaged before one optimizer step.", Integer(1))
    precision: str = setting(
        "launcher",
        'Autocast of the forward: `"no"`, `"bf16"` or `"fp16"`; `"launcher"` is what `accelerate launch` was told, or '
        '`"no"` without it.',
        Choice("launcher", "no", "bf16", "fp16"),
    )

    # two optimizers and their learning rates
    optimizer: str = setting(
        "sgd", 'Optimizer of weights, biases and norms: a name of timm\'s factory, as `"sgd"` or `"adamw"`.', Text()
    )
    lr: float = setting(0.02, "Learning rate of `optimizer`.", Number(least=0))
    lr_unit: str = setting(
        "absolute",
        'Unit of both learning rates: `"absolute"`, or `"size"`, a share of each parameter\'s own size: the distance '
        "of two levels of a weight, a tenth of anything else. For optimizers whose steps do not grow with the "
        "gradient.",
        Choice("absolute", "size"), before="absolute",
    )  # fmt: skip
    momentum: float = setting(0.9, "Momentum of optimizers that have one.", Number(least=0, below=1))
    weight_decay: float = setting(1e-4, "Weight decay of `optimizer`.", Number(least=0))
    decay: str = setting(
        "all", 'Which parameters of `optimizer` decay: `"all"` as published, or `"weights"`, not biases and norms.',
        Choice("all", "weights"),
    )  # fmt: skip
    no_decay: tuple[str, ...] = setting(
        (), "Names, globs or `re:` patterns of parameters without weight decay, of both optimizers.", Names()
    )
    quantizer_optimizer: str = setting(
        "adam", "Optimizer of bounds, LSQ's steps and `output_scale`: a name of timm's factory.", Text()
    )
    quantizer_lr: float = setting(1e-3, "Learning rate of `quantizer_optimizer`.", Number(least=0))
    quantizer_weight_decay: float = setting(0.0, "Weight decay of `quantizer_optimizer`.", Number(least=0))
    clip_grad: float | None = setting(None, "Largest norm of the gradient, or None (0) for no limit.", Limit())
    schedule: str = setting(
        "cosine",
        'Course of both learning rates, step by step: `"cosine"` or `"linear"` to 0, `"step"`, or `"constant"`.',
        Choice("cosine", "linear", "step", "constant"),
    )  # fmt: skip
    warmup_steps: int = setting(0, "Steps at the start over which both learning rates rise linearly.", Integer(0))
    step_epochs: int = setting(30, 'Epochs between two falls of the `"step"` schedule.', Integer(1))
    step_factor: float = setting(
        0.1, "What the learning rates are multiplied with at each of these falls.", Number(least=0, most=1)
    )

    # what inputs go through
    label_smoothing: float = setting(0.0, "Label smoothing of the cross entropy.", Number(least=0, below=1))
    mixup: float = setting(0.0, "Alpha of timm's mixup; 0 for none.", Number(least=0))
    cutmix: float = setting(0.0, "Alpha of timm's cutmix; 0 for none.", Number(least=0))
    augment: str = setting(
        "",
        'timm\'s automatic augmentation, as `"rand-m9-mstd0.5"`; `""` for none. Like the next three fields, it acts '
        "on the loaders that the command line makes.",
        Text(),
    )
    color_jitter: float = setting(0.0, "Strength of timm's color jitter.", Number(least=0))
    random_erasing: float = setting(0.0, "Probability of timm's random erasing.", Number(least=0, most=1))
    crop_scale: float = setting(0.08, "Smallest share of the image that a random crop takes.", Number(least=0, most=1))

    # the loss
    distill: float = setting(
        0.5, "Weight of the distillation loss, towards the float model; 1 needs no targets.", Number(least=0, most=1)
    )
    temperature: float = setting(2.0, "Temperature of the softmax in the distillation loss.", Number(above=0))
    features: tuple[str, ...] = setting(
        (),
        'Names, globs or `re:` patterns of modules whose outputs are drawn towards the teacher\'s; `"auto"` is every '
        "block.",
        Names(),
    )
    feature_weight: float = setting(1.0, "Weight of the loss of these outputs.", Number(least=0))

    # averages, batch norms, and what is fitted before the first step
    ema: float = setting(
        0.0, "Decay of a moving average of the weights, which is evaluated and kept; 0 for none.",
        Number(least=0, below=1),
    )  # fmt: skip
    ema_warmup: bool = setting(True, "Whether that decay rises to its value over the first steps.", Flag())
    batch_norm: str = setting(
        "train",
        'What batch norms do: `"train"` as usual, or `"freeze"` to keep the running statistics and use them.',
        Choice("train", "freeze"),
    )
    batch_norm_freeze_at: float = setting(
        1.0, 'Share of the run after which `"train"` becomes `"freeze"`; 1 is never.', Number(least=0, most=1)
    )
    gptq: int = setting(
        0,
        "Training batches from which GPTQ chooses the levels of the weights before the first step; 0 leaves each on "
        "its nearest level.",
        Integer(0), before=0,
    )  # fmt: skip
    reconstruct: int = setting(
        0,
        "Steps that each block trains on its own output, block after block, before the first step; 0 for none.",
        Integer(0), before=0,
    )  # fmt: skip
    reconstruct_batches: int = setting(
        32, "Training batches that blocks train on, taken from several epochs where one has fewer.",
        Integer(1), before=32,
    )  # fmt: skip
    reestimate: int = setting(
        0,
        "Training batches from which batch norms take their statistics anew before each evaluation, or once before "
        'the first step if `batch_norm` is `"freeze"`; 0 for none.',
        Integer(0),
    )

    # quantizers
    freeze_bounds_at: float = setting(
        1.0, "Share of the run after which the quantizers' parameters stay as they are; 1 is never.",
        Number(least=0, most=1),
    )  # fmt: skip
    progressive: tuple[tuple[float, int, int], ...] = setting(
        (),
        "Stages `[until, w_bits, a_bits]`: until that share of the run every site has at least that many bits.",
        Stages(),
    )
    final_w_sigma: float = setting(
        0.0,
        "Kernel width of DAQ's rounding at the end of the run, for weights of at most `final_sigma_bits` bits; it "
        "moves there evenly from the model's own. 0 leaves it.",
        Number(least=0), before=0.0,
    )  # fmt: skip
    final_a_sigma: float = setting(
        2.0,
        "That kernel width for inputs of at most `final_sigma_bits` bits; 0 leaves it.",
        Number(least=0),
        before=0.0,
    )
    final_sigma_bits: int = setting(
        1, "Most bits of the weights and inputs whose kernel width moves.", Integer(1), before=2
    )

    # when to stop, what to watch, what to keep
    patience: int = setting(
        0, "Epochs without a better validation result after which training stops; 0 is never.", Integer(0)
    )
    oscillation: str = setting(
        "log",
        'What to do about weights that jump back and forth between two levels: `"log"` their share, `"freeze"` them, '
        'or `"off"`.',
        Choice("log", "freeze", "off"),
    )
    oscillation_threshold: float = setting(
        0.02, "Jumps per step above which a weight counts as oscillating.", Number(least=0, most=1)
    )
    explode: float = setting(
        10.0, "Training ends with an error when the loss is this many times its running mean; 0 never looks.",
        Number(least=0),
    )  # fmt: skip
    checkpoint_steps: int = setting(
        0, "Steps between two checkpoints besides those at the ends of epochs; 0 for none.", Integer(0)
    )
    keep: int = setting(2, "Checkpoints that are kept, the last one among them.", Integer(1))
    final_epoch: str = setting(
        "best",
        'Epoch whose weights the model ends with: the `"best"` on the validation loader, where there is one, or the '
        '`"last"`.',
        Choice("best", "last"), before="best",
    )  # fmt: skip

    # before the first step
    calibration_batches: int = setting(
        8, "Training batches that set the bounds which were not calibrated before.", Integer(1)
    )
    calibration_method: str = setting("mse", "Method of that calibration, as `calibrate` takes it.", Choice(*METHODS))
    seed: int = setting(0, "Seed of shuffling, augmentation and dropout.", Integer(0))

    def __post_init__(self) -> None:
        for name in FIELDS:
            value = check_field(name, getattr(self, name), f"recipe {self.name!r}")
            object.__setattr__(self, name, value)
        problem = _contradiction(self)
        if problem:
            raise TrainingError(f"recipe {self.name!r}: {problem}.")

    def replace(self, **changes: Any) -> Recipe:
        """Return a copy with some fields changed.

        Args:
            **changes: Field name -> value.

        Raises:
            TrainingError: If there is no such field or it cannot take that value (the message says the nearest), or
                fields contradict each other.
        """
        check_names(changes, f"recipe {self.name!r}")
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dict of plain values, as they come back from JSON."""
        found: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return found

    def to_toml(self) -> str:
        """Return the recipe as TOML that `recipe` reads back.

        Example:
            >>> Recipe(epochs=2).to_toml().splitlines()[:2]
            ['name = "quick"', 'epochs = 2']
        """
        return toml_text({key: 0 if value is None else value for key, value in self.to_dict().items()})


FIELDS: dict[str, dataclasses.Field[Any]] = {field.name: field for field in dataclasses.fields(Recipe)}
"""Every field by name, in order; its `metadata` holds `meaning`, `kind` and `before`, as `setting` declares them."""


def check_field(name: str, value: Any, where: str) -> Any:
    """Return a user's value in the form in which the field `name` stores it; error messages begin with `where`.

    Raises:
        TrainingError: If the field cannot take the value.
    """
    try:
        return FIELDS[name].metadata["kind"].stored(value)
    except ValueError as error:
        raise TrainingError(f"{where}: {name}: expected {error}; found {value!r}.") from None


def check_names(values: Iterable[str], where: str) -> None:
    """Raise `TrainingError` if a name is not a field's; the message begins with `where` and says the nearest field."""
    for name in values:
        if name not in FIELDS:
            raise TrainingError(f"{where}: {name!r} is not a field of a recipe.{nearest(name, FIELDS)}")


_GRADIENT_STEPS = re.compile("sgd|momentum|nesterov")
"""Part of timm's name of every optimizer whose step is the gradient, or its running mean, times the rate."""


def _contradiction(recipe: Recipe) -> str:
    """Return which valid fields do not go together and what to change, `""` if there are none.

    An option that can have no effect is an error, because nothing else would tell the user.
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
