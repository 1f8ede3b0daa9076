"""What a model gives its blocks, batch by batch: by forwards that end there, or carried on from the block before."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves, tree_map_only

from daqconvert.batches import Enough, run_batch, run_batch_until

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of one call of a module."""


@dataclass
class Stage:
    """A block as the first forward shows it, with the batch norms that follow it.

    Attributes:
        names: Of the modules; what one returns is all that the next one is called with.
        chained: Whether all that the first is called with is the tensor that the stage before this one returned.
        calls: Of the first, in one forward.
        tensor: Whether the last returns one tensor of floating point.
    """

    names: list[str]
    chained: bool = False
    calls: int = 0
    tensor: bool = False

    def module(self, model: nn.Module) -> nn.Module:
        """Return the stage as one module of a model."""
        modules = [model.get_submodule(name) for name in self.names]
        return modules[0] if len(modules) == 1 else nn.Sequential(*modules).eval()


class _Order:
    """Hooks of one forward: modules that are not inside of each other begin and end in turn."""

    def __init__(self) -> None:
        self.stages: dict[str, Stage] = {}
        self._norms: set[str] = set()
        self._open: Stage | None = None
        self._last: Tensor | None = None

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> None:
        """A block begins."""
        if name not in self.stages:
            self.stages[name] = Stage([name], self._follows(args, kwargs))
        self._open = self.stages[name]
        self._open.calls += 1

    def before_norm(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> None:
        """A batch norm begins that is in no block: it goes with the stage whose output it takes."""
        follows = name not in self._norms and self._follows(args, kwargs)
        self._open = list(self.stages.values())[-1] if follows else None
        self._norms.add(name)
        if self._open is not None:
            self._open.names.append(name)

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Either ends."""
        self._last = output if isinstance(output, Tensor) and output.is_floating_point() else None
        if self._open is None:
            self._last = None
        else:
            self._open.tensor = self._last is not None

    def _follows(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        return self._last is not None and len(args) == 1 and not kwargs and args[0] is self._last


def stages(model: nn.Module, batch: Any, names: list[str]) -> list[Stage]:
    """Return the stages that a forward reaches, in order.

    Args:
        model: From `quantize`, in evaluation mode.
        batch: As `calibrate` takes it.
        names: Of the blocks; none is inside of another.
    """
    order, inside = _Order(), {id(m) for name in names for m in model.get_submodule(name).modules()}
    norms = [name for name, m in model.named_modules() if isinstance(m, _BatchNorm) and id(m) not in inside]
    with ExitStack() as stack, torch.no_grad():
        for hook, several in ((order.before, names), (order.before_norm, norms)):
            for name in several:
                module = model.get_submodule(name)
                stack.callback(module.register_forward_pre_hook(partial(hook, name=name), with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(order.after).remove)
        run_batch(model, batch)
    return list(order.stages.values())


class BlockFlow:
    """A model's inputs to one stage after another, and what it returns there.

    Args:
        model: In evaluation mode.
        batches: As `calibrate` takes them; read once for each stage that is not chained.

    Attributes:
        block: The stage that was reached last, as a module.
        calls: What it is called with, one entry per batch.
    """

    def __init__(self, model: nn.Module, batches: list[Any]) -> None:
        self.model, self.batches = model, batches
        self.block: nn.Module = model
        self.calls: list[Call] = []

    def reach(self, stage: Stage, given: list[Tensor] | None) -> None:
        """Go on to a stage.

        Args:
            stage: The next one.
            given: What the stage before it returns now, if that is all that this one is called with.
        """
        self.block = stage.module(self.model)
        self._first = self.model.get_submodule(stage.names[0])
        self.calls = [((tensor,), {}) for tensor in given] if given is not None else self._record()

    @torch.no_grad()
    def outputs(self) -> list[Tensor]:
        """Return what the block returns for every call, as it is now."""
        return [call_block(self.block, call) for call in self.calls]

    @torch.no_grad()
    def _record(self) -> list[Call]:
        calls: list[Call] = []

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.append((args, kwargs))
            raise Enough

        handle = self._first.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            for batch in self.batches:
                run_batch_until(self.model, batch)
        finally:
            handle.remove()
        return calls


def copied(call: Call) -> Call:
    """Return a call with copies of its tensors: some blocks change their input in place, and it is needed again."""
    found: Call = tree_map_only(Tensor, torch.clone, call)
    return found


def call_block(block: nn.Module, call: Call) -> Tensor:
    """Return what a block returns; the call stays as it was."""
    args, kwargs = copied(call)
    output: Tensor = block(*args, **kwargs)
    return output


def rows_of(call: Call, rows: Tensor) -> Call:
    """Return a call with one tensor for some of its rows."""
    found: Call = tree_map_only(Tensor, lambda tensor: tensor[rows], call)
    return found


def treats_rows_alone(block: nn.Module, call: Call, target: Tensor) -> bool:
    """Return whether a block computes for some rows of its input what it computes for them among all.

    Not where the first dimension is none of samples, and where something else has to fit the batch.

    Args:
        block: In evaluation mode, in float.
        call: Of the whole batch.
        target: What it returned.

    Example:
        >>> x = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
        >>> [treats_rows_alone(m, ((x,), {}), m(x)) for m in (nn.Softmax(dim=1), nn.Softmax(dim=0))]
        [True, False]
    """
    tensors = [leaf for leaf in tree_leaves(call) if isinstance(leaf, Tensor)]
    if len(tensors) != 1 or not tensors[0].dim() or not target.dim() or len(tensors[0]) != len(target):
        return False
    rows = torch.arange(0, len(target), 2, device=target.device)
    try:
        with torch.no_grad():
            some = call_block(block, rows_of(call, rows))
    except RuntimeError:  # shapes that do not fit
        return False
    return some.shape == target[rows].shape and torch.allclose(some, target[rows], rtol=1e-2, atol=1e-3)
