"""One optimizer step: the batches of a group forward and backward, what the processes agree on, the update.

    gradient = mean over processes of the mean over the group's batches of the gradient of each batch's loss

The random state of a step is a function of (seed, step), and of the process where there are several.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

from daqconvert.training.batching.loaders import UNLABELLED, Inputs, inputs_count, read_batch
from daqconvert.training.batching.seeding import derived_seed, seed_generators
from daqconvert.training.parts.base import Step

if TYPE_CHECKING:
    from daqconvert.training.engine import Run

T = TypeVar("T")


def groups_of(batches: Iterable[T], count: int) -> Iterator[list[T]]:
    """Yield `count` batches at a time; the last group may be smaller.

    Args:
        batches: In order.
        count: Size of a group.

    Yields:
        Groups.

    Example:
        >>> list(groups_of([1, 2, 3], 2))
        [[1, 2], [3]]
    """
    group: list[T] = []
    for batch in batches:
        group.append(batch)
        if len(group) == count:
            yield group
            group = []
    if group:
        yield group


def take_step(run: Run, wrapped: Any, group: list[Any]) -> tuple[Step, list[float]]:
    """Train on the batches of one group.

    Args:
        run: The run; its position moves on by one step.
        wrapped: What is called instead of its model.
        group: Batches as the loader gives them.

    Returns:
        What was done, and the signals that came, over all processes.

    Raises:
        TrainingError: If the loss is NaN or infinite; the parameters are as they were then.
    """
    position, processes = run.position, run.processes
    number = position.number + 1
    where = f"epoch {position.epoch}, step {position.steps + 1}{f' of {run.steps}' if run.steps else ''}"
    needs, device = run.objective.needs_target, processes.device
    read = [read_batch(b, device, where, needs_target=needs, hint=UNLABELLED) for b in group]
    run.optimizers.set_step(number - 1)
    for part in run.parts:
        part.before_step(run, number)
    rank = (processes.index,) if processes.count > 1 else ()
    seed_generators(derived_seed(run.recipe.seed, number, "model", *rank), devices=device.type != "cpu")
    run.optimizers.zero_grad()
    losses = [
        _forward_and_backward(run, wrapped, inputs, target, len(group), last=i == len(group))
        for i, (inputs, target) in enumerate(read, 1)
    ]
    total, *came = processes.sum([sum(losses) / len(group), *map(float, run.signals.came)])
    loss = total / processes.count
    if not math.isfinite(loss):
        raise run.diverged(f"{where}: the loss is {loss}")
    norm = processes.update(run.optimizers, run.recipe.clip_grad)
    position.number, position.steps, position.batches = number, position.steps + 1, position.batches + len(group)
    return Step(number, run.total_steps, position.epoch, loss, norm), came


def _forward_and_backward(run: Run, wrapped: Any, inputs: Inputs, target: Any, share: int, *, last: bool) -> float:
    """Add one batch's part to the gradients, and to the meter."""
    processes = run.processes
    with processes.syncing(wrapped, last):
        with processes.autocast():
            loss, outputs = run.objective(wrapped, inputs, target)
        processes.backward(loss / share if share > 1 else loss)
    value = float(loss.detach())
    outputs = outputs.detach() if isinstance(outputs, Tensor) else outputs
    run.position.meter.add(value, inputs_count(inputs), outputs, target, strict=False)
    return value
