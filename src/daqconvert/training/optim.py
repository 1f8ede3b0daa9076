"""Two parameter groups, two optimizers, one schedule.

Quantizer parameters (`lower`, `upper`, `output_scale`): Adam, no weight decay. Everything else: SGD with momentum.
The learning rates of a step are a pure function of its number, so a resumed run needs no state for them.

Source: "Distance-aware Quantization" (Kim, Lee, Ham, ICCV 2021) and its published training code.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from daqconvert.errors import TrainingError
from daqconvert.layers.site import QuantizedSite
from daqconvert.quantizers.base import Quantizer
from daqconvert.training.recipes import Recipe

WEIGHTS, QUANTIZERS = "weights", "quantizers"


def lr_factor(step: int, total: int, schedule: str = "cosine", warmup: int = 0) -> float:
    """Return what the learning rate of a step is multiplied with.

    Warm-up: `(step + 1) / (warmup + 1)` while `step < warmup`. Then 1 for `"constant"`, and for `"cosine"`
    `(1 + cos(pi * (step - warmup) / (total - warmup))) / 2`, which is 1 at `warmup` and 0 at `total`.

    Args:
        step: Number of optimizer steps before this one.
        total: Steps of the whole run.
        schedule: `"cosine"` or `"constant"`.
        warmup: Steps of the linear rise.

    Example:
        >>> [round(lr_factor(step, 4), 3) for step in range(5)]
        [1.0, 0.854, 0.5, 0.146, 0.0]
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule == "constant":
        return 1.0
    part = min(1.0, (step - warmup) / max(1, total - warmup))  # a stream may give more batches than its length says
    return 0.5 * (1.0 + math.cos(math.pi * part))


def parameter_groups(model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """Return the trainable parameters by group, `"weights"` and `"quantizers"`, each by dotted name.

    Args:
        model: A quantized model.

    Example:
        >>> import daqconvert as dq
        >>> qmodel = dq.quantize(nn.Sequential(nn.Linear(4, 2)), w_bits=4, a_bits=4)
        >>> {group: sorted(named) for group, named in parameter_groups(qmodel).items()}["weights"]
        ['0.bias', '0.weight']
    """
    own: set[int] = set()
    for module in model.modules():
        if isinstance(module, Quantizer):
            own.update(id(p) for p in module.parameters())
        if isinstance(module, QuantizedSite):
            own.add(id(module.output_scale))
    groups: dict[str, dict[str, nn.Parameter]] = {WEIGHTS: {}, QUANTIZERS: {}}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[QUANTIZERS if id(parameter) in own else WEIGHTS][name] = parameter
    return groups


class Optimizers:
    """SGD for the weights and Adam for the quantizers, stepped together; a group without parameters has none.

    Make it after calibration or loading: only then is it known which `lower` bounds are trained.

    Args:
        model: A quantized model.
        recipe: Gives learning rates, momentum, weight decay and schedule.
        total_steps: Steps of the whole run, where the cosine ends.

    Raises:
        TrainingError: If no parameter is trainable.

    Example:
        >>> import daqconvert as dq
        >>> qmodel = dq.quantize(nn.Sequential(nn.Linear(4, 2)), w_bits=4, a_bits=4)
        >>> optimizers = Optimizers(qmodel, Recipe(lr=0.1, quantizer_lr=0.01), total_steps=10)
        >>> optimizers.set_step(5)["weights"]
        0.05
    """

    def __init__(self, model: nn.Module, recipe: Recipe, total_steps: int) -> None:
        self.recipe, self.total_steps = recipe, total_steps
        self.named = {group: named for group, named in parameter_groups(model).items() if named}
        if not self.named:
            raise TrainingError(
                f"{type(model).__name__}: no parameter requires a gradient. Call model.requires_grad_(True)."
            )
        self.base_lr = {WEIGHTS: recipe.lr, QUANTIZERS: recipe.quantizer_lr}
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        if WEIGHTS in self.named:
            groups = _decay_groups(self.named[WEIGHTS], recipe)
            self.optimizers[WEIGHTS] = torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum)
        if QUANTIZERS in self.named:
            parameters = list(self.named[QUANTIZERS].values())
            self.optimizers[QUANTIZERS] = torch.optim.Adam(parameters, lr=recipe.quantizer_lr, weight_decay=0.0)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All trained parameters."""
        return [parameter for named in self.named.values() for parameter in named.values()]

    def set_step(self, step: int) -> dict[str, float]:
        """Set the learning rates of a step, counted from 0, and return them by group."""
        factor = lr_factor(step, self.total_steps, self.recipe.schedule, self.recipe.warmup_steps)
        rates = {group: base * factor for group, base in self.base_lr.items()}
        for group, optimizer in self.optimizers.items():
            for parameters in optimizer.param_groups:
                parameters["lr"] = rates[group]
        return rates

    def step(self) -> None:
        """Update all parameters."""
        for optimizer in self.optimizers.values():
            optimizer.step()

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state as flat tensors, `GROUP/SLOT/PARAMETER`, as `weights/momentum_buffer/conv.weight`."""
        state = {}
        for group, named in self.named.items():
            for name, parameter in named.items():
                for slot, value in self.optimizers[group].state.get(parameter, {}).items():
                    state[f"{group}/{slot}/{name}"] = value
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Replace the state by what `state_dict` returned.

        Args:
            state: Flat tensors.

        Raises:
            TrainingError: If an entry belongs to no parameter of this model, or has another shape.
        """
        loaded: dict[str, dict[str, dict[str, Any]]] = {group: {} for group in self.named}
        for key, value in state.items():
            group, slot, name = (*key.split("/", 2), "", "")[:3]
            parameter = self.named.get(group, {}).get(name)
            if parameter is None or (value.dim() and value.shape != parameter.shape):
                raise TrainingError(f"optimizer state {key!r} of shape {tuple(value.shape)} fits no parameter.")
            if slot == "step":  # Adam keeps its count of steps as a float32 scalar on the CPU
                loaded[group].setdefault(name, {})[slot] = value.clone()
            else:
                loaded[group].setdefault(name, {})[slot] = torch.empty_like(parameter.detach()).copy_(value)
        for group, named in self.named.items():
            optimizer = self.optimizers[group]
            optimizer.state.clear()
            for name, slots in loaded[group].items():
                optimizer.state[named[name]] = slots


def _decay_groups(named: dict[str, nn.Parameter], recipe: Recipe) -> list[dict[str, Any]]:
    """All parameters with weight decay, or those of fewer than two dimensions (biases, norms) without."""
    split: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for parameter in named.values():
        split[recipe.decay == "all" or parameter.dim() >= 2].append(parameter)
    return [
        {"params": parameters, "weight_decay": recipe.weight_decay if decays else 0.0}
        for decays, parameters in split.items()
        if parameters
    ]
