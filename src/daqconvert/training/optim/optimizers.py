"""Two parameter groups, two optimizers, one schedule.

Optimizers by name: those of timm's factory that need no more than a gradient and keep only tensors and numbers.

`sgd` is plain SGD with momentum here, as in torch and in the published recipes; timm means Nesterov's by it, which is
`nesterov` here and there.

The learning rate of a step, as a pure function of its number: a resumed run needs no state for it.
"""

from __future__ import annotations

import functools
import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from daqconvert.errors import TrainingError, nearest
from daqconvert.posttraining import parameter_sizes, step_in_sizes
from daqconvert.training.optim.groups import QUANTIZERS, WEIGHTS, decay_groups, parameter_groups, undecayed
from daqconvert.training.optim.state import flat_state, group_settings, restore_state
from daqconvert.training.recipes import Recipe


class Optimizers:
    """One optimizer for the weights and one for the quantizers, stepped together; a group without parameters has none.

    Make it after calibration or loading: only then is it known which `lower` bounds are trained.

    Args:
        model: A quantized model.
        recipe: Gives both optimizers, learning rates, momentum, weight decay and schedule.
        total_steps: Optimizer steps of the whole run, where the cosine ends; 0 where unknown.

    Attributes:
        named: Parameters by group and name.
        optimizers: By group.
        total_steps: As above.
        resting: Groups that `step` leaves alone, gradients and all; empty at first. A part fills it again when a run
            is resumed.

    Raises:
        TrainingError: If no parameter is trainable, an optimizer is unknown or cannot be used, a pattern of
            `no_decay` matches nothing, or the schedule has to know where it ends and the length is unknown.

    Example:
        >>> import daqconvert as dq
        >>> qmodel = dq.quantize(nn.Sequential(nn.Linear(4, 2)), w_bits=4, a_bits=4)
        >>> optimizers = Optimizers(qmodel, Recipe(lr=0.1, quantizer_lr=0.01), total_steps=10)
        >>> optimizers.set_step(5)["weights"]
        0.05
    """

    def __init__(self, model: nn.Module, recipe: Recipe, total_steps: int) -> None:
        self.recipe, self.total_steps, self._model = recipe, total_steps, model
        self.resting: set[str] = set()
        self.named = {group: named for group, named in parameter_groups(model).items() if named}
        if not self.named:
            raise TrainingError(
                f"{type(model).__name__}: no parameter requires a gradient. Call model.requires_grad_(True)."
            )
        if total_steps <= 0 and recipe.schedule != "constant":
            raise TrainingError(
                f"schedule: {recipe.schedule!r} has to know how many steps the run has, and the loader has no length. "
                'Give it a __len__, or train with schedule="constant".'
            )
        self.base_lr = {WEIGHTS: recipe.lr, QUANTIZERS: recipe.quantizer_lr}
        kinds = {WEIGHTS: recipe.optimizer, QUANTIZERS: recipe.quantizer_optimizer}
        check_optimizer(recipe.optimizer, "optimizer")
        check_optimizer(recipe.quantizer_optimizer, "quantizer_optimizer")
        spared = undecayed(model, recipe)
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        for group, named in self.named.items():
            groups = decay_groups(group, named, recipe, spared)
            self.optimizers[group] = make_optimizer(kinds[group], groups, self.base_lr[group], recipe.momentum)
        self._fresh = {group: group_settings(optimizer) for group, optimizer in self.optimizers.items()}

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All parameters that the next step changes."""
        return [
            parameter
            for group, named in self.named.items()
            if group not in self.resting
            for parameter in named.values()
        ]

    def rates(self, step: int) -> dict[str, float]:
        """Return the learning rates of a step, counted from 0, by group."""
        recipe = self.recipe
        fall_steps = recipe.step_epochs * self.total_steps // recipe.epochs
        factor = lr_factor(
            step, self.total_steps, recipe.schedule, recipe.warmup_steps, fall_steps=fall_steps,
            fall=recipe.step_factor,
        )  # fmt: skip
        return {group: base * factor for group, base in self.base_lr.items()}

    def set_step(self, step: int) -> dict[str, float]:
        """Set the learning rates of a step, counted from 0, and return them by group."""
        rates = self.rates(step)
        for group, optimizer in self.optimizers.items():
            for parameters in optimizer.param_groups:
                parameters["lr"] = rates[group]
        return rates

    def step(self) -> None:
        """Update all parameters but those of resting groups, whose gradients are dropped."""
        sizes = parameter_sizes(self._model) if self.recipe.lr_unit == "size" else None
        for group, optimizer in self.optimizers.items():
            if group in self.resting:
                optimizer.zero_grad(set_to_none=True)
            elif sizes is not None:
                step_in_sizes(optimizer, sizes)
            else:
                optimizer.step()

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state as flat tensors, `GROUP/SLOT/PARAMETER`, as `weights/momentum_buffer/conv.weight`.

        Numbers, and what an optimizer keeps once for many parameters: see `optim.state`.
        """
        return {
            f"{group}/{key}": value
            for group, named in self.named.items()
            for key, value in flat_state(self.optimizers[group], named, self._fresh[group]).items()
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Replace the state by what `state_dict` returned.

        Args:
            state: Flat tensors.

        Raises:
            TrainingError: If an entry belongs to no parameter of this model, or has another shape.
        """
        split: dict[str, dict[str, Tensor]] = {group: {} for group in self.named}
        for key, value in state.items():
            group, _, rest = key.partition("/")
            if group not in split:
                raise TrainingError(f"optimizer state {key!r} of shape {tuple(value.shape)} fits no parameter.")
            split[group][rest] = value
        for group, named in self.named.items():
            restore_state(self.optimizers[group], named, self._fresh[group], split[group], f"{group}/")


_OURS = {"sgd": "momentum"}  # names that mean something else in timm
_SHAPES = ((4, 3, 2, 2), (4, 3), (4,), ())


def check_optimizer(name: str, field: str) -> None:
    """Raise unless a recipe may name this optimizer.

    Args:
        name: As the recipe has it.
        field: `"optimizer"` or `"quantizer_optimizer"`, for the message.

    Raises:
        TrainingError: If timm has no such optimizer (names the nearest), or it cannot be used here.

    Example:
        >>> check_optimizer("adamw", "optimizer")
    """
    from timm.optim import list_optimizers

    valid = [str(known) for known in list_optimizers()]
    if name not in valid:
        raise TrainingError(
            f"{field}: {name!r} is no optimizer of timm's factory, as sgd, nesterov, adam, adamw, lamb or lion are."
            f"{nearest(name, valid)}"
        )
    problem = _problem(name)
    if problem:
        raise TrainingError(f"{field}: {name!r} cannot be used: {problem}. Try sgd, adamw, lamb or lion.")


def make_optimizer(name: str, groups: list[dict[str, Any]], lr: float, momentum: float = 0.9) -> torch.optim.Optimizer:
    """Return an optimizer of timm's factory.

    Args:
        name: One that `check_optimizer` lets pass.
        groups: Parameter groups, each with its `weight_decay`.
        lr: Learning rate.
        momentum: For those that have it.

    Example:
        >>> make_optimizer("sgd", [{"params": [nn.Parameter(torch.zeros(2))]}], 0.1).defaults["nesterov"]
        False
    """
    from timm.optim import create_optimizer_v2

    made: torch.optim.Optimizer = create_optimizer_v2(
        groups, opt=_OURS.get(name, name), lr=lr, weight_decay=0.0, momentum=momentum
    )
    return made


@functools.cache
def _problem(name: str) -> str:
    """What is against an optimizer, found by two steps with small tensors; `""` where nothing is."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        generator = torch.Generator().manual_seed(0)
        parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in _SHAPES]
        try:
            optimizer = make_optimizer(name, [{"params": parameters, "weight_decay": 0.1}], 1e-3)
            for _ in range(2):
                for parameter in parameters:
                    parameter.grad = torch.randn(parameter.shape, generator=generator)
                optimizer.step()
        except Exception as error:  # NOTE: whatever it is that it lacks: a closure, a graph, CUDA, another package
            what = str(error).splitlines()[0] if str(error) else type(error).__name__
            return f"a step with nothing but gradients failed ({what})"
    for parameter in parameters:
        for slot, value in optimizer.state[parameter].items():
            if not isinstance(value, (Tensor, int, float)):
                return f"its state {slot!r} is a {type(value).__name__}, and checkpoints keep tensors and numbers"
    return ""


def lr_factor(
    step: int, total: int, schedule: str = "cosine", warmup: int = 0, *, fall_steps: int = 1, fall: float = 0.1
) -> float:
    """Return what the learning rate of a step is multiplied with.

    Warm-up: `(step + 1) / (warmup + 1)` while `step < warmup`. Then, with `t = (step - warmup) / (total - warmup)`:
    `"cosine"` is `(1 + cos(pi t)) / 2`, `"linear"` is `1 - t`, both 1 at `warmup` and 0 at `total`; `"step"` is
    `fall ** floor(step / fall_steps)`; `"constant"` is 1.

    Args:
        step: Number of optimizer steps before this one.
        total: Steps of the whole run.
        schedule: `"cosine"`, `"linear"`, `"step"` or `"constant"`.
        warmup: Steps of the linear rise.
        fall_steps: Steps between two falls of `"step"`, counted from the start of the run.
        fall: What each of them multiplies with.

    Example:
        >>> [round(lr_factor(step, 4), 3) for step in range(5)]
        [1.0, 0.854, 0.5, 0.146, 0.0]
        >>> [lr_factor(step, 4, "step", fall_steps=2, fall=0.5) for step in range(5)]
        [1.0, 1.0, 0.5, 0.5, 0.25]
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule == "constant":
        return 1.0
    if schedule == "step":
        return float(fall ** (step // max(1, fall_steps)))
    part = min(1.0, (step - warmup) / max(1, total - warmup))  # a stream may give more batches than its length says
    return 1.0 - part if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * part))
