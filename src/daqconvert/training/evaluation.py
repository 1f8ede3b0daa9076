"""The verb `evaluate`: top-k and loss of a float, quantized or frozen model over a loader."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from daqconvert.batches import model_device
from daqconvert.errors import DataError, TrainingError
from daqconvert.models import evaluating
from daqconvert.report.progress import track
from daqconvert.training.batching.epochs import Epochs
from daqconvert.training.batching.loaders import check_loader, inputs_count, read_batch
from daqconvert.training.losses import (
    LossFn,
    check_classes,
    checked_target,
    correct,
    logits_of,
    mean_cross_entropy,
    targets_count,
)
from daqconvert.training.processes import Processes

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class EvalResult:
    """What `evaluate` measured.

    Attributes:
        top1: Share of targets that are the class of the largest logit, 0..1; None where `loss_fn` takes outputs that
            are not logits of classes, or targets that are neither class numbers nor probabilities.
        loss: Mean loss; over all targets, or over the batches by their number of inputs where there is a `loss_fn`.
        count: Number of targets.
        topk: Share of targets among the `k` largest logits, 0..1, by `k`.
    """

    top1: float | None
    loss: float
    count: int
    topk: Mapping[int, float]

    def __str__(self) -> str:
        """Return `top-1 91.2 %, loss 0.31, 10000 targets`."""
        shares = "".join(f"top-{k} {100 * share:.2f} %, " for k, share in self.topk.items())
        return f"{shares}loss {self.loss:.4f}, {self.count} targets"


def evaluate(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    topk: tuple[int, ...] = (1,),
    loss_fn: LossFn | None = None,
    progress: bool = True,
    accelerator: Accelerator | None = None,
) -> EvalResult:
    """Measure a model on labelled batches, in evaluation mode; every module gets its own mode back.

    Args:
        model: A float, quantized or frozen model that returns logits `(N, C, ...)` of two or more classes.
        loader: Batches with targets: `(input, target)`, or dicts with one under `target`, `label` or `labels`. Targets
            are class numbers `(N, ...)`, -100 where there is none, or probabilities of the logits' shape, unless there
            is a `loss_fn`.
        topk: Numbers `k` for which to return the share of targets among the `k` largest logits.
        loss_fn: Function of `(outputs, target)` that returns the mean loss over the batch, instead of the cross
            entropy.
        progress: Show a bar where standard error is a terminal.
        accelerator: An `accelerate.Accelerator`, among whose processes the batches are shared: each batch is read by
            one process, and all get the same result. The model has to be the same on each, as after `finetune`.

    Returns:
        The shares of targets hit, the mean loss, and the number of targets.

    Raises:
        DataError: If there is no batch, or a batch has no target or one that does not fit the outputs.
        TrainingError: If the outputs are not one tensor of logits, or have fewer than `k` classes.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> _ = model.load_state_dict({"weight": torch.eye(2), "bias": torch.zeros(2)})
        >>> result = evaluate(model, [(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0]))])
        >>> result.top1, result.count
        (0.5, 2)
    """
    check_loader(loader, "evaluate: loader")
    if accelerator is None:
        return measured(model, loader, topk=topk, loss_fn=loss_fn, progress=progress)
    processes = Processes(accelerator, model)
    processes.place(model)
    epochs = Epochs(loader, 0, processes.index, processes.count, even=False)
    show = progress and processes.is_main
    return measured(model, epochs.batches(0), topk=topk, loss_fn=loss_fn, progress=show, processes=processes)


def measured(
    model: nn.Module, batches: Iterable[Any], *, topk: tuple[int, ...] = (1,), loss_fn: LossFn | None = None,
    progress: bool = True, total: int | None = None, processes: Processes | None = None,
) -> EvalResult:  # fmt: skip
    """Return the result of `evaluate` for the batches of this process; their loader has been checked.

    `total` is the number of batches, for the progress bar. With `processes`, each of them has to call this, and the
    result covers the batches of all.

    Raises:
        DataError: If there is no batch, or one does not fit.
    """
    device, meter = model_device(model), Meter(topk)
    with evaluating(model), torch.no_grad():
        for i, batch in enumerate(track(batches, "evaluating", total, enabled=progress)):
            (args, kwargs), target = read_batch(batch, device, f"evaluate: batch {i}", needs_target=True, model=model)
            outputs = model(*args, **kwargs)
            count = inputs_count((args, kwargs))
            if loss_fn is None:
                try:
                    logits = logits_of(outputs)
                    target = checked_target(logits, target)
                    check_classes(logits, target)
                    loss, count = mean_cross_entropy(logits, target), targets_count(target)
                except DataError as error:
                    raise DataError(f"evaluate: batch {i}: {error}") from None
            else:
                loss = loss_fn(outputs, target)
            meter.add(float(loss), count, outputs, target, strict=loss_fn is None)
    if processes is not None:
        meter = meter.over(processes)
    if meter.inputs == 0:
        raise DataError(
            "evaluate: expected at least one batch with a target, found none. Is the loader empty, each target -100?"
        )
    return EvalResult(meter.top1, meter.loss, meter.targets if meter.shares else meter.inputs, meter.shares)


class Meter:
    """Means over batches: the loss, weighted by inputs, and the share of targets among the `k` largest logits.

    There is no share where some batch was no classification: the others would be a part that nobody chose.

    Hits are counted on the device of the outputs and read only when they are asked for, so that adding a batch does
    not wait for the device.
    """

    def __init__(self, topk: tuple[int, ...] = (1,)) -> None:
        self.topk = topk
        self.inputs = 0
        self._loss = 0.0
        self._counts = [0] * (len(topk) + 1)  # hits for each k, then the number of targets
        self._unread: Tensor | None = None  # counts on the device that are not in `_counts` yet
        self._others = 0  # batches that were no classification

    def add(self, loss: float, inputs: int, outputs: Any, target: Any, *, strict: bool) -> None:
        """Count one batch: its mean loss, its number of inputs, the model's outputs and the target, if there is one.

        Without `strict`, a batch whose outputs and targets are no classification counts for the loss alone.

        Raises:
            DataError: If `strict` and the targets do not fit the outputs.
            TrainingError: If `strict` and the outputs are not logits, or have fewer than `k` classes.
        """
        self.inputs += inputs
        self._loss += loss * inputs
        try:
            new = correct(logits_of(outputs), target, self.topk)
        except (DataError, TrainingError):
            if strict:
                raise
            self._others += 1
            return
        if self._unread is not None and self._unread.device != new.device:
            self._read()
        self._unread = new if self._unread is None else self._unread + new

    def sums(self) -> list[float]:
        """Return everything that was counted, as numbers that may be added to another meter's."""
        *hits, targets = self._read()
        return [self._loss, self.inputs, targets, *hits, self._others]

    def load(self, sums: Sequence[float]) -> None:
        """Go on from what `sums` returned; before there was a count of batches without a class, it was left out."""
        self._loss, inputs, targets, *more = sums
        hits, others = more[: len(self.topk)], more[len(self.topk) :]
        self.inputs, self._counts, self._unread = int(inputs), [int(n) for n in (*hits, targets)], None
        self._others = int(sum(others))

    def over(self, processes: Processes) -> Meter:
        """Return a meter of what all processes counted; all of them have to call this."""
        found = Meter(self.topk)
        found.load(processes.sum(self.sums()))
        return found

    @property
    def targets(self) -> int:
        """Number of targets."""
        return self._read()[-1]

    @property
    def loss(self) -> float:
        """Mean loss."""
        return self._loss / max(1, self.inputs)

    @property
    def shares(self) -> dict[int, float]:
        """Share of targets hit, by `k`; empty where nothing was counted, or some batch was no classification."""
        *hits, targets = self._read()
        known = targets and not self._others
        return {k: n / targets for k, n in zip(self.topk, hits, strict=True)} if known else {}

    @property
    def top1(self) -> float | None:
        """Share of targets that the largest logit hit."""
        return self.shares.get(1)

    def _read(self) -> list[int]:
        """Return the hits for each `k`, then the number of targets; waits for the device."""
        if self._unread is not None:
            self._counts = [a + b for a, b in zip(self._counts, self._unread.tolist(), strict=True)]
            self._unread = None
        return self._counts
