"""Losses of a batch, and how many of its targets were hit.

Logits are `(N, C)` or `(N, C, ...)`, in float32. Targets are class numbers `(N, ...)`, -100 where there is none, or
probabilities of the logits' shape. Means are over everything that has a target.

Source of the distillation loss: "Distilling the Knowledge in a Neural Network" (Hinton, Vinyals, Dean, 2015),
https://arxiv.org/abs/1503.02531, section 2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from daqconvert.errors import DataError, TrainingError

LossFn = Callable[[Any, Any], Tensor]
IGNORED = -100  # torch's ignore_index


def logits_of(outputs: Any, who: str = "the model") -> Tensor:
    """Return a model's outputs as logits in float32 (float64 stays); the message says that `who` returned them.

    Raises:
        TrainingError: If they are not one floating-point tensor `(N, C, ...)`.
    """
    if not isinstance(outputs, Tensor):
        found = f"a {type(outputs).__name__}"
    elif outputs.dim() < 2 or not outputs.is_floating_point():
        found = f"a tensor of shape {tuple(outputs.shape)} and {outputs.dtype}"
    else:
        return outputs if outputs.dtype == torch.float64 else outputs.float()
    raise TrainingError(
        f"expected one tensor of logits (N, C, ...) from {who}, found {found}. Pass loss_fn=, a function "
        "of (outputs, target), and distill=0.0."
    )


def cross_entropy(logits: Tensor, target: Any, smoothing: float = 0.0) -> Tensor:
    """Return the mean cross entropy, with label smoothing 0..1.

    Raises:
        DataError: If the target does not fit the logits.

    Example:
        >>> round(cross_entropy(torch.zeros(1, 2), torch.tensor([1])).item(), 4)
        0.6931
    """
    target = checked_target(logits, target)
    try:
        return F.cross_entropy(logits, target, label_smoothing=smoothing, ignore_index=IGNORED)
    except IndexError:
        valid = target[target != IGNORED]
        raise DataError(
            f"targets: expected classes 0 to {logits.shape[1] - 1}, as the model has {logits.shape[1]} outputs; "
            f"found {int(valid.min())} to {int(valid.max())}. Does the model fit the data set?"
        ) from None


def checked_target(logits: Tensor, target: Any) -> Tensor:
    """Return a target, which may be a list of class numbers, as int64 class numbers or as probabilities.

    Raises:
        DataError: If it is neither class numbers `(N, ...)` nor probabilities of the logits' shape.
    """
    if isinstance(target, (list, tuple)) and all(isinstance(value, int) for value in target):
        target = torch.tensor(target, device=logits.device)
    wanted = (logits.shape[0], *logits.shape[2:])
    if isinstance(target, Tensor):
        if target.is_floating_point() and target.shape == logits.shape:
            return target.to(logits.dtype)
        if tuple(target.shape) == wanted and not (target.is_floating_point() or target.is_complex()):
            return target.long()
    found = (
        f"{target.dtype} of shape {tuple(target.shape)}"
        if isinstance(target, Tensor)
        else f"a {type(target).__name__}"
    )
    raise DataError(
        f"targets: expected integers of shape {wanted}, or probabilities of shape {tuple(logits.shape)}, for outputs "
        f"of shape {tuple(logits.shape)}; found {found}. For another loss pass loss_fn=."
    )


def count_correct(logits: Tensor, target: Any, topk: tuple[int, ...] = (1,)) -> tuple[list[int], int]:
    """Return, for each `k`, how often the target is among the `k` largest logits, and the number of targets.

    Where targets are probabilities, the class with the largest one is the target.

    Raises:
        TrainingError: If there are fewer than `k` classes.

    Example:
        >>> count_correct(torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([1, 1]))
        ([1], 2)
    """
    *hits, targets = correct(logits, target, topk).tolist()
    return hits, targets


def correct(logits: Tensor, target: Any, topk: tuple[int, ...]) -> Tensor:
    """Return the counts of `count_correct` as one tensor on the logits' device, the number of targets last.

    Raises:
        TrainingError: If there are fewer than `k` classes.

    Example:
        >>> correct(torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([1, 1]), (1,)).tolist()
        [1, 2]
    """
    if topk and not 1 <= min(topk) <= max(topk) <= logits.shape[1]:
        raise TrainingError(f"topk: expected numbers from 1 to {logits.shape[1]}, the model's classes; found {topk}.")
    target = checked_target(logits, target)
    if target.is_floating_point():
        target = target.argmax(dim=1)
    counts = []
    for k in topk:  # for k = 1 argmax, as is usual elsewhere: it decides between equal logits
        best = logits.argmax(dim=1, keepdim=True) if k == 1 else logits.topk(k, dim=1).indices
        counts.append((best == target.unsqueeze(1)).any(dim=1).sum())
    return torch.stack([*counts, (target != IGNORED).sum()])


def distillation(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return `T^2 * KL(softmax(teacher / T) || softmax(logits / T))` at temperature `T`, the mean over all but dim 1.

    Both are logits of the same shape `(N, C, ...)`.

    Raises:
        TrainingError: If the shapes differ.

    Example:
        >>> z = torch.tensor([[1.0, 2.0]])
        >>> distillation(z, z, 2.0).item()
        0.0
    """
    if logits.shape != teacher.shape:
        raise TrainingError(
            f"distillation: the teacher's outputs have shape {tuple(teacher.shape)}, the model's "
            f"{tuple(logits.shape)}. Pass a teacher with the same classes, or distill=0.0."
        )
    ours, theirs = F.log_softmax(logits / temperature, dim=1), F.log_softmax(teacher / temperature, dim=1)
    divergence = F.kl_div(ours, theirs, reduction="sum", log_target=True)
    return divergence * (temperature**2 * logits.shape[1] / logits.numel())
