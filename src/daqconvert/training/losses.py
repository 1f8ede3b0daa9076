"""Losses of a batch, and how many of its targets were hit.

Logits are `(N, C)` or `(N, C, ...)` of two or more classes, in float32. Targets are class numbers `(N, ...)`, -100
where there is none, or probabilities of the logits' shape: not negative, and their sum over the classes is 1. All
else, such as the numbers of a regression or several labels an input, is an error that says which loss to pass. Means
are over everything that has a target; a batch without any has the loss 0.

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
SUM_TOLERANCE = 0.01  # of probabilities; written with two digits, or in 16 bits, they add up to less or more than 1


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
    """Return the mean cross entropy, with label smoothing 0..1; 0 where nothing has a target.

    Raises:
        DataError: If the target does not fit the logits.

    Example:
        >>> round(cross_entropy(torch.zeros(1, 2), torch.tensor([1])).item(), 4)
        0.6931
    """
    return mean_cross_entropy(logits, checked_target(logits, target), smoothing)


def mean_cross_entropy(logits: Tensor, target: Tensor, smoothing: float = 0.0) -> Tensor:
    """Return what `cross_entropy` does, of a target that `checked_target` gave.

    Raises:
        DataError: If there is a class number that is none of the model's.

    Example:
        >>> mean_cross_entropy(torch.zeros(1, 2), torch.tensor([IGNORED])).item()
        0.0
    """
    try:
        if target.is_floating_point():
            return F.cross_entropy(logits, target, label_smoothing=smoothing)
        total = F.cross_entropy(logits, target, label_smoothing=smoothing, ignore_index=IGNORED, reduction="sum")
        return total / (target != IGNORED).sum().clamp(min=1)  # torch's own mean over no target is NaN
    except IndexError as error:
        check_classes(logits, target)
        raise DataError(f"targets: {error}") from error


def checked_target(logits: Tensor, target: Any) -> Tensor:
    """Return a target, which may be a list of class numbers, as int64 class numbers or as probabilities.

    Raises:
        DataError: If it is neither class numbers `(N, ...)` nor probabilities of the logits' shape, or there is one
            class alone: then every cross entropy is 0, and nothing would be learned.

    Example:
        >>> checked_target(torch.zeros(2, 3), [0, 2]).tolist()
        [0, 2]
        >>> checked_target(torch.zeros(2, 1), torch.tensor([[0.5], [7.0]]))
        Traceback (most recent call last):
        daqconvert.errors.DataError: targets: expected outputs for two classes or more, (N, C, ...); found shape
        (2, 1): with one output every cross entropy is 0. For numbers pass loss_fn=torch.nn.functional.mse_loss, for
        yes or no loss_fn=torch.nn.functional.binary_cross_entropy_with_logits; finetune also needs distill=0.0.
    """
    if logits.shape[1] < 2:
        raise DataError(
            f"targets: expected outputs for two classes or more, (N, C, ...); found shape {tuple(logits.shape)}: with "
            f"one output every cross entropy is 0. {ONE_OUTPUT}"
        )
    if isinstance(target, (list, tuple)) and all(isinstance(value, int) for value in target):
        target = torch.tensor(target, device=logits.device)
    wanted = (logits.shape[0], *logits.shape[2:])
    if isinstance(target, Tensor):
        if target.is_floating_point() and target.shape == logits.shape:
            return _probabilities(logits, target)
        if tuple(target.shape) == wanted and not (target.is_floating_point() or target.is_complex()):
            return target.long()
    found = (
        f"{target.dtype} of shape {tuple(target.shape)}"
        if isinstance(target, Tensor)
        else f"a {type(target).__name__}"
    )
    raise DataError(
        f"targets: expected integers of shape {wanted}, or probabilities of shape {tuple(logits.shape)}, for outputs "
        f"of shape {tuple(logits.shape)}; found {found}. {_instead(logits, target, wanted)}For another loss pass "
        "loss_fn=."
    )


FUNCTIONAL = "loss_fn=torch.nn.functional"
ONE_OUTPUT = (
    f"For numbers pass {FUNCTIONAL}.mse_loss, for yes or no {FUNCTIONAL}.binary_cross_entropy_with_logits; finetune "
    "also needs distill=0.0."
)


def check_classes(logits: Tensor, target: Tensor) -> None:
    """Raise unless each class number that `checked_target` gave is one of the model's; waits for the device.

    A GPU does not raise for another number: it stops, and every later call of it fails.

    Raises:
        DataError: If one is not.

    Example:
        >>> check_classes(torch.zeros(2, 3), torch.tensor([2, IGNORED]))
    """
    valid = target[target != IGNORED]
    if (
        target.is_floating_point()
        or not valid.numel()
        or (int(valid.min()) >= 0 and int(valid.max()) < logits.shape[1])
    ):
        return
    raise DataError(
        f"targets: expected classes 0 to {logits.shape[1] - 1}, as the model has {logits.shape[1]} outputs; "
        f"found {int(valid.min())} to {int(valid.max())}. Does the model fit the data set? {IGNORED} is for none."
    )


def targets_count(target: Tensor) -> int:
    """Return how many targets there are in what `checked_target` gave; -100 is none.

    Example:
        >>> targets_count(torch.tensor([1, IGNORED])), targets_count(torch.full((2, 4), 0.25))
        (1, 2)
    """
    if target.is_floating_point():
        return target.numel() // target.shape[1]
    return int((target != IGNORED).sum())


def _probabilities(logits: Tensor, target: Tensor) -> Tensor:
    """Return floating-point targets in the dtype of the logits, if each column is a distribution over the classes."""
    found = target.detach().to(logits.dtype)
    sums = found.sum(dim=1)
    if not bool((found >= 0).all() & ((sums - 1).abs() <= SUM_TOLERANCE).all()):  # NaN is no probability either
        low, high, least, most = (float(value) for value in (found.min(), found.max(), sums.min(), sums.max()))
        raise DataError(
            f"targets: {target.dtype} of shape {tuple(target.shape)}, the outputs' own, would be probabilities of the "
            f"{logits.shape[1]} classes: expected none below 0, and sums over the classes of 1; found values from "
            f"{low:g} to {high:g} and sums from {least:g} to {most:g}. For several labels an input pass "
            f"{FUNCTIONAL}.binary_cross_entropy_with_logits, for numbers {FUNCTIONAL}.mse_loss; finetune also needs "
            "distill=0.0."
        )
    return target.to(logits.dtype)


def _instead(logits: Tensor, target: Any, wanted: tuple[int, ...]) -> str:
    """Return one sentence on what to pass, where the form of a target that does not fit says what it may be."""
    if not isinstance(target, Tensor) or target.is_complex():
        return ""
    if target.is_floating_point():
        return "Class numbers need target.long(). " if tuple(target.shape) == wanted else ""
    if target.shape == logits.shape:
        return "One 1 a row is target.float() or target.argmax(dim=1). "
    if tuple(target.shape) == (wanted[0], 1, *wanted[1:]):
        return "Class numbers need target.squeeze(1). "
    return ""


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
        TrainingError: If the shapes differ, or there is one output alone: its softmax is 1 whatever it is.

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
    if logits.shape[1] < 2:
        raise TrainingError(
            f"distillation: expected outputs for two classes or more, (N, C, ...); found shape {tuple(logits.shape)}: "
            "the softmax of one output is always 1, so nothing would be learned from the teacher. Pass distill=0.0, "
            "with targets and a loss_fn= of them."
        )
    ours, theirs = F.log_softmax(logits / temperature, dim=1), F.log_softmax(teacher / temperature, dim=1)
    divergence = F.kl_div(ours, theirs, reduction="sum", log_target=True)
    return divergence * (temperature**2 * logits.shape[1] / logits.numel())
