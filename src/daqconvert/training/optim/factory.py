"""Optimizers by name: those of timm's factory that need no more than a gradient and keep only tensors and numbers.

`sgd` is plain SGD with momentum here, as in torch and in the published recipes; timm means Nesterov's by it, which is
`nesterov` here and there.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from daqconvert.errors import TrainingError, nearest

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
