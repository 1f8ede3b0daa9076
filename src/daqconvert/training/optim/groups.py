"""Which parameters each optimizer trains, which of them decay, and the course of the learning rate."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from daqconvert.posttraining import bounds_and_scales
from daqconvert.training.patterns import matching
from daqconvert.training.recipes import Recipe

WEIGHTS, QUANTIZERS = "weights", "quantizers"


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
    own = bounds_and_scales(model)
    groups: dict[str, dict[str, nn.Parameter]] = {WEIGHTS: {}, QUANTIZERS: {}}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[QUANTIZERS if parameter in own else WEIGHTS][name] = parameter
    return groups


def undecayed(model: nn.Module, recipe: Recipe) -> set[str]:
    """Return the names of the parameters that `no_decay` means; a pattern that matches none is a `TrainingError`."""
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    return set(matching(recipe.no_decay, names, "no_decay", "parameter"))


def decay_groups(group: str, named: dict[str, nn.Parameter], recipe: Recipe, spared: set[str]) -> list[dict[str, Any]]:
    """Return the parameter groups of one optimizer: the parameters that decay, then those that do not.

    The parameters named in `spared` do not decay, nor do biases and norms (fewer than two dimensions) with
    `decay = "weights"`.
    """
    split: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    amount = recipe.weight_decay if group == WEIGHTS else recipe.quantizer_weight_decay
    for name, parameter in named.items():
        by_kind = group == QUANTIZERS or recipe.decay == "all" or parameter.dim() >= 2
        split[by_kind and name not in spared].append(parameter)
    return [
        {"params": parameters, "weight_decay": amount if decays else 0.0}
        for decays, parameters in split.items()
        if parameters
    ]


def lr_factor(
    step: int, total: int, schedule: str = "cosine", warmup: int = 0, *, fall_steps: int = 1, fall: float = 0.1
) -> float:
    """Return the factor of the learning rate at a step: a function of its number, so a resumed run needs no state.

    Warm-up: `(step + 1) / (warmup + 1)` while `step < warmup`. Then, with `t = (step - warmup) / (total - warmup)`:
    `"cosine"` is `(1 + cos(pi t)) / 2`, `"linear"` is `1 - t`, both 1 at `warmup` and 0 at `total`; `"step"` is
    `fall ** floor(step / fall_steps)`; `"constant"` is 1.

    Args:
        step: Number of optimizer steps before this one.
        total: Steps of the whole run.
        schedule: `"cosine"`, `"linear"`, `"step"` or `"constant"`.
        warmup: Steps of the linear rise.
        fall_steps: Steps between two falls of `"step"`, counted from the start of the run.
        fall: Factor of each fall.

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
