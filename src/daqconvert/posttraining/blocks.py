"""The blocks of a quantized model: their names, their order in a forward, their inputs and outputs.

A block is an innermost module that holds two quantized layers or more, such as a residual block, an inverted residual,
an attention or an MLP. A block and the batch norms that follow it are a *stage*. The inputs of a stage are recorded by
forwards that end there. If the only input of a stage is the output of the stage before, that output is carried on and
no forward is needed.
"""

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
from daqconvert.layers.base import QuantizedLayer
from daqconvert.models import quantized_sites

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of one call of a module."""


def block_names(model: nn.Module) -> list[str]:
    """Return the names of a quantized model's blocks and of the layers between them, in the model's order.

    The first and the last quantized layer are left out unless they are in a block: the first gets the same input as in
    the float model, and the last returns the logits.

    Args:
        model: A model from `quantize`.

    Example:
        >>> block = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        >>> block_names(dq.quantize(nn.Sequential(nn.Linear(4, 4), block, nn.Linear(4, 4), nn.Linear(4, 2))))
        ['1', '2']
    """
    sites = quantized_sites(model)
    below: dict[str, int] = {}
    for name in sites:
        parts = name.split(".")
        for depth in range(1, len(parts)):
            above = ".".join(parts[:depth])
            below[above] = below.get(above, 0) + 1
    several = [name for name, count in below.items() if count > 1]
    blocks = {name for name in several if not any(other.startswith(f"{name}.") for other in several)}
    ends = {next(iter(sites)), next(reversed(sites))} if sites else set()
    for name, site in sites.items():
        inside = any(name.startswith(f"{block}.") for block in blocks)
        if isinstance(site, QuantizedLayer) and not inside and name not in ends:
            blocks.add(name)
    return [name for name, _ in model.named_modules() if name in blocks]


@dataclass
class Stage:
    """A block, as the first forward shows it, and the batch norms that follow it.

    Attributes:
        names: Names of the modules; the output of each is the only input of the next.
        chained: Whether the only input of the first module is the tensor that the stage before this one returned.
        calls: How often one forward calls the first module.
        tensor: Whether the last module returns one floating-point tensor.
    """

    names: list[str]
    chained: bool = False
    calls: int = 0
    tensor: bool = False

    def module(self, model: nn.Module) -> nn.Module:
        """Return the modules of the stage, in this model, as one module."""
        modules = [model.get_submodule(name) for name in self.names]
        return modules[0] if len(modules) == 1 else nn.Sequential(*modules).eval()


def stages(model: nn.Module, batch: Any, names: list[str]) -> list[Stage]:
    """Return the stages that a forward of one batch reaches, in order. No block of `names` is inside another."""
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


class _Order:
    """Hooks that find the stages of one forward. Their modules are not inside each other, so they run one by one."""

    def __init__(self) -> None:
        self.stages: dict[str, Stage] = {}
        self._norms: set[str] = set()
        self._open: Stage | None = None
        self._last: Tensor | None = None

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> None:
        """Note that a block begins."""
        if name not in self.stages:
            self.stages[name] = Stage([name], self._follows(args, kwargs))
        self._open = self.stages[name]
        self._open.calls += 1

    def before_norm(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> None:
        """Note that a batch norm outside all blocks begins: it joins the stage whose output it takes."""
        follows = name not in self._norms and self._follows(args, kwargs)
        self._open = list(self.stages.values())[-1] if follows else None
        self._norms.add(name)
        if self._open is not None:
            self._open.names.append(name)

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Note what a block or batch norm returned."""
        self._last = output if isinstance(output, Tensor) and output.is_floating_point() else None
        if self._open is None:
            self._last = None
        else:
            self._open.tensor = self._last is not None

    def _follows(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        return self._last is not None and len(args) == 1 and not kwargs and args[0] is self._last


class BlockFlow:
    """The inputs and outputs of one stage after another, in a model in evaluation mode.

    Attributes:
        block: The stage that was reached last, as a module.
        calls: Arguments that this stage is called with, one entry per batch.
    """

    def __init__(self, model: nn.Module, batches: list[Any]) -> None:
        self.model, self.batches = model, batches
        self.block: nn.Module = model
        self.calls: list[Call] = []

    def reach(self, stage: Stage, given: list[Tensor] | None) -> None:
        """Go on to the next stage; `given` are the present outputs of the stage before, if it takes nothing else."""
        self.block = stage.module(self.model)
        self._first = self.model.get_submodule(stage.names[0])
        self.calls = [((tensor,), {}) for tensor in given] if given is not None else self._record()

    @torch.no_grad()
    def outputs(self) -> list[Tensor]:
        """Return what the block, as it is now, returns for every call."""
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
    """Return a call with copies of its tensors: some blocks change their input in place, and calls are used again."""
    found: Call = tree_map_only(Tensor, torch.clone, call)
    return found


def call_block(block: nn.Module, call: Call) -> Tensor:
    """Call a block and return its output; the tensors of the call stay as they were."""
    args, kwargs = copied(call)
    output: Tensor = block(*args, **kwargs)
    return output


def rows_of(call: Call, rows: Tensor) -> Call:
    """Return some rows of a call that has one tensor."""
    found: Call = tree_map_only(Tensor, lambda tensor: tensor[rows], call)
    return found


def treats_rows_alone(block: nn.Module, call: Call, target: Tensor) -> bool:
    """Return whether a float block treats rows alone: called with some rows, it returns these rows of `target`.

    `target` is the block's output for the whole call. A block does not treat rows alone if the first dimension is not
    that of the samples, or if something else in the block depends on the size of the batch.

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
