"""The processes of a run: how many there are, their precision, and what they tell each other.

This is the one place that touches Accelerate. Each process trains on batches of its own, and gradients are averaged.
Process 0, the main one, writes files and shows progress. With one process nothing here changes a model: it stays on
its device, and its `forward` is its own.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from daqconvert.batches import model_device
from daqconvert.errors import DaqError, TrainingError
from daqconvert.training.recipes import Recipe

if TYPE_CHECKING:
    from accelerate import Accelerator


T = TypeVar("T")
PRECISIONS = ("no", "bf16", "fp16")
REFUSED = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "XLA")  # they split parameters, or need code of their own
PATCHED = ("forward", "_original_forward", "_is_accelerate_prepared")  # what `prepare_model` leaves on a model


class Processes:
    """The processes of a run, seen from one of them.

    Attributes:
        count: Number of processes.
        index: Number of this process, from 0.
        device: Where the model trains: with several processes this process's own device, else where the model is.
        precision: Precision of the forward: `"no"`, `"bf16"` or `"fp16"`.
        launcher_accumulate: Batches per step, as set in the launcher.
        own: Whether the accelerator was made here; else it is the caller's, who has decided how it trains.
    """

    def __init__(self, accelerator: Accelerator, model: nn.Module, *, own: bool = False) -> None:
        self._accelerator, self.own = accelerator, own
        self.count, self.index = int(accelerator.num_processes), int(accelerator.process_index)
        self.precision = str(accelerator.mixed_precision)
        self.launcher_accumulate = int(accelerator.gradient_accumulation_steps)
        self.device = accelerator.device if self.count > 1 else model_device(model)
        _check(accelerator, self)

    @property
    def is_main(self) -> bool:
        """Whether this is process 0, which writes."""
        return self.index == 0

    def place(self, model: nn.Module) -> None:
        """Move a model to this process's device; with one process it stays where it is."""
        if self.count > 1:
            model.to(self.device)

    @contextmanager
    def wrapping(self, model: nn.Module, *, find_unused: bool = True) -> Iterator[Any]:
        """Yield what is called instead of a model while it trains; afterwards nothing of it is left on the model.

        With `find_unused` torch looks for parameters without a gradient in every step, which takes time. An
        accelerator of the caller's own decides that itself.

        Yields:
            The model itself; among several processes a `DistributedDataParallel` around it.
        """
        if self.count == 1:
            yield model
            return
        kept = {key: model.__dict__[key] for key in PATCHED if key in model.__dict__}
        before = list(self._accelerator._models)
        if self.own:
            self._accelerator.ddp_handler.find_unused_parameters = find_unused
        wrapped = self._accelerator.prepare_model(model, device_placement=False)
        for key in PATCHED:  # Accelerate's autocast is around the forward alone; ours is around the loss as well
            model.__dict__.pop(key, None)
        model.__dict__.update(kept)
        try:
            yield wrapped
        finally:
            self._accelerator._models[:] = before

    def autocast(self) -> AbstractContextManager[None]:
        """Return the context in which model and loss compute in the run's precision."""
        found: AbstractContextManager[None] = self._accelerator.autocast()
        return found

    def syncing(self, wrapped: Any, enabled: bool) -> AbstractContextManager[Any]:
        """Return the context in which gradients are averaged over processes, or only added up."""
        found: AbstractContextManager[Any] = (
            torch.enable_grad() if enabled or self.count == 1 else self._accelerator.no_sync(wrapped)
        )
        return found

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss to the present ones; in fp16 they are scaled."""
        # NOTE: not `Accelerator.backward`, which divides by the launcher's number of batches, not by that of the group
        scaler = self._accelerator.scaler
        (loss if scaler is None else scaler.scale(loss)).backward()

    def update(self, optimizers: Steps, clip: float | None) -> float | None:
        """Clip the gradients to a norm of `clip`, unless it is None, and update the parameters.

        The result is the norm before clipping, or None where it was not needed.
        """
        scaler, norm = self._accelerator.scaler, None
        scaled = ScaledOptimizers(optimizers)
        if clip is not None:
            if scaler is not None:
                scaler.unscale_(scaled)
            norm = float(self._accelerator.clip_grad_norm_(scaled.parameters, clip))
        if scaler is None:
            optimizers.step()
        else:
            scaler.step(scaled)
            scaler.update()
        return norm

    def scaler_state(self) -> dict[str, Any]:
        """Return the state of the gradient scaler, as values for JSON; empty where there is none."""
        scaler = self._accelerator.scaler
        return {} if scaler is None else dict(scaler.state_dict())

    def load_scaler(self, state: dict[str, Any]) -> None:
        """Restore what `scaler_state` returned."""
        if state and self._accelerator.scaler is not None:
            self._accelerator.scaler.load_state_dict(state)

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return the sums of some numbers over all processes, the same everywhere."""
        if self.count == 1:
            return list(values)
        found: list[float] = self._accelerator.reduce(
            torch.tensor(values, dtype=torch.float64, device=self.device), "sum"
        ).tolist()
        return found

    def from_main(self, make: Callable[[], T]) -> T:
        """Call `make` on the main process alone; return its result, or raise its error, on every process.

        Raises:
            TrainingError: On the other processes, in place of an error that is not one of daqconvert's.
        """
        if self.count == 1:
            return make()
        from accelerate.utils import broadcast_object_list

        said: list[Any] = [None, None]
        failed: Exception | None = None
        if self.is_main:
            try:
                said[0] = make()
            except Exception as error:  # NOTE: every process has to hear of it, or they wait for the main one forever
                failed = error
                said[1] = error if isinstance(error, DaqError) else TrainingError(f"process 0: {error!r}")
        broadcast_object_list(said)
        if failed is not None:
            raise failed
        if said[1] is not None:
            raise said[1]
        result: T = said[0]
        return result

    @torch.no_grad()
    def agree(self, model: nn.Module) -> None:
        """Copy a model's parameters and buffers from the main process to all, flags and signs of quantizers too."""
        if self.count == 1:
            return
        from accelerate.utils import broadcast

        state = model.state_dict()
        for key, value in state.items():
            if isinstance(value, Tensor):
                plain = value.detach().to(self.device, copy=True).contiguous()
                sent = broadcast(plain.to(torch.uint8) if plain.dtype == torch.bool else plain)
                state[key] = sent.to(value.dtype)
        if not self.is_main:
            model.load_state_dict(state)


@contextmanager
def launched(model: nn.Module, recipe: Recipe, accelerator: Accelerator | None = None) -> Iterator[Processes]:
    """Yield the processes among which this one was launched.

    Without an accelerator of the caller's own, one is made from the launcher's settings and the recipe's `precision`;
    Accelerate's global state is restored afterwards.

    Yields:
        The processes.

    Raises:
        TrainingError: If the launcher, the precision or the device do not go together with this training.

    Example:
        >>> with launched(nn.Linear(2, 2), Recipe()) as processes:
        ...     processes.count, processes.is_main
        (1, True)
    """
    from accelerate.state import AcceleratorState, GradientState, PartialState

    states = [kind._shared_state for kind in (PartialState, AcceleratorState, GradientState)]
    before = [dict(state) for state in states]
    try:
        _check_precision(recipe, accelerator)
        yield Processes(accelerator or _accelerator(model, recipe), model, own=accelerator is None)
    finally:
        if accelerator is None:
            for state, kept in zip(states, before, strict=True):
                state.clear()
                state.update(kept)


def _accelerator(model: nn.Module, recipe: Recipe) -> Accelerator:
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs

    for name in REFUSED:
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
            raise TrainingError(_refusal(name))
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    cpu = not torch.accelerator.is_available() if several else model_device(model).type == "cpu"
    handler = DistributedDataParallelKwargs()  # `wrapping` says whether to look for parameters without a gradient
    precision = None if recipe.precision == "launcher" else recipe.precision
    grouped = torch.distributed.is_initialized()
    try:
        made = Accelerator(device_placement=False, mixed_precision=precision, cpu=cpu, kwargs_handlers=[handler])
    except ValueError as error:
        raise TrainingError(f"precision={recipe.precision!r}: {error}") from None
    if torch.distributed.is_initialized() and not grouped:  # the group stays for later calls
        atexit.register(_leave_group)
    return made


def _leave_group() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _check_precision(recipe: Recipe, accelerator: Accelerator | None) -> None:
    if accelerator is not None and recipe.precision not in ("launcher", accelerator.mixed_precision):
        raise TrainingError(
            f"accelerator: has mixed_precision={accelerator.mixed_precision!r}, the recipe precision="
            f'{recipe.precision!r}. Pass precision="launcher", or make the accelerator with the same.'
        )


def _check(accelerator: Accelerator, processes: Processes) -> None:
    kind = str(accelerator.distributed_type.value)
    if kind in REFUSED:
        raise TrainingError(_refusal(kind))
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if world != processes.count:
        raise TrainingError(
            f"finetune: there are {world} processes, and Accelerate knows of {processes.count}. Start them with "
            "accelerate launch or torchrun, or pass accelerator=Accelerator()."
        )
    if processes.precision not in PRECISIONS:
        raise TrainingError(f"precision: expected one of {', '.join(PRECISIONS)}; found {processes.precision!r}.")
    if processes.precision == "fp16" and (accelerator.scaler is None or processes.device.type == "cpu"):
        raise TrainingError('precision="fp16": needs a GPU, and the model is on the CPU. Use "bf16" or "no".')
    if processes.precision != "no" and processes.device.type != accelerator.device.type:
        raise TrainingError(
            f"precision={processes.precision!r}: the model is on {processes.device}, Accelerate on "
            f"{accelerator.device}. Call model.to({str(accelerator.device)!r})."
        )


def _refusal(kind: str) -> str:
    return (
        f"finetune: {kind} is not supported: bounds and weights must be whole on every process. Run accelerate config "
        "and choose plain multi-GPU or multi-CPU training."
    )


class Steps(Protocol):
    """What `Processes.update` needs of the optimizers."""

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All trained parameters."""
        ...

    def step(self) -> None:
        """Update all trained parameters."""
        ...


class ScaledOptimizers:
    """Several optimizers behind the interface of one, for `torch.amp.GradScaler`: all of them step, or none does.

    Attributes:
        parameters: All trained parameters.
        param_groups: One group that holds them all.
    """

    def __init__(self, optimizers: Steps) -> None:
        self._optimizers = optimizers
        self.parameters = optimizers.parameters
        self.param_groups: list[dict[str, Any]] = [{"params": self.parameters}]

    def step(self) -> None:
        """Update all parameters."""
        self._optimizers.step()
