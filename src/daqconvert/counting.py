"""The verb `coverage`: how much of what a model multiplies was quantized, counted while it ran."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from daqconvert.convert import PLAN_ATTRIBUTE, current_plan
from daqconvert.macs import Event, assign, counting
from daqconvert.spec import Plan, PlanRow


@dataclass(frozen=True)
class SiteCount:
    """What ran at one place.

    Attributes:
        name: Of the site, as in the plan; of the parameter or buffer where no site of the plan has it; empty where the
            weight has no name.
        macs: Multiply-accumulates, for the whole batch.
        weight: Part of `macs` whose weight was quantized (of an attention product: the second operand).
        input: Part of `macs` whose input was quantized (of an attention product: the first operand).
        both: Part of `macs` of which both were.
        module: Dotted name of the module that was running.
        op: Name of torch's operator, as `"addmm"`; the first one where several ran.
        reason: Why the plan leaves it alone.
    """

    name: str
    macs: int
    weight: int
    input: int
    both: int
    module: str = ""
    op: str = ""
    reason: str = ""

    @property
    def weight_quantized(self) -> bool:
        """Whether the weight was quantized every time."""
        return self.weight == self.macs

    @property
    def input_quantized(self) -> bool:
        """Whether the input was quantized every time."""
        return self.input == self.macs


@dataclass(frozen=True)
class Coverage:
    """What `coverage` counted; prints as a table.

    Attributes:
        model: Class name of the model.
        sites: One per site that ran, in order of execution.
        unassigned: Products with a weight that belong to no site of the plan.
        skipped: The plan's rows that are left alone, each with its reason, whether they ran or not.
        attention: Products of activations, one per module; no part of `macs`.

    Example:
        >>> import daqconvert as dq
        >>> counted = dq.coverage(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), torch.ones(2, 4))
        >>> print(counted)
        site  op     MACs  weight  input  remarks
        0     addmm    24   float  float
        Sequential: 0.0% of 24 MACs have both operands quantized, 0.0% the weight
    """

    model: str
    sites: tuple[SiteCount, ...] = ()
    unassigned: tuple[SiteCount, ...] = ()
    skipped: tuple[PlanRow, ...] = ()
    attention: tuple[SiteCount, ...] = ()

    @property
    def macs(self) -> int:
        """Multiply-accumulates of all convolutions and products with a weight."""
        return sum(row.macs for row in self._weighted)

    @property
    def share(self) -> float:
        """Part of `macs`, 0 to 1, of which both operands were quantized."""
        return _ratio(sum(row.both for row in self._weighted), self.macs)

    @property
    def share_weights(self) -> float:
        """Part of `macs`, 0 to 1, whose weight was quantized."""
        return _ratio(sum(row.weight for row in self._weighted), self.macs)

    @property
    def products(self) -> int:
        """Multiply-accumulates of attention products: both operands are activations."""
        return sum(row.macs for row in self.attention)

    @property
    def share_products(self) -> float:
        """Part of `products`, 0 to 1, of which both operands were quantized."""
        return _ratio(sum(row.both for row in self.attention), self.products)

    @property
    def _weighted(self) -> tuple[SiteCount, ...]:
        return self.sites + self.unassigned

    def __getitem__(self, name: str) -> SiteCount:
        for row in self.sites:
            if row.name == name:
                return row
        raise KeyError(f"{name!r} is no site that ran. Ran: {', '.join(row.name or '(root)' for row in self.sites)}")

    def __str__(self) -> str:
        """Return the counts as plain text, one place a line."""
        rows = [("site", "op", "MACs", "weight", "input", "remarks")]
        rows += [_text(row, row.name or "(root)", row.reason) for row in self.sites]
        rows += [_text(row, row.name or "(no name)", f"no site; ran in {_path(row)}") for row in self.unassigned]
        rows += [_text(row, _path(row), "product of activations") for row in self.attention]
        ran = {row.name for row in self.sites}
        rows += [(r.name or "(root)", "", "-", "-", "-", r.reason) for r in self.skipped if r.name not in ran]
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        ways = (str.ljust, str.ljust, str.rjust, str.rjust, str.rjust)
        lines = [
            "  ".join([*(way(cell, w) for way, cell, w in zip(ways, row[:5], widths, strict=True)), row[5]]).rstrip()
            for row in rows
        ]
        last = (
            f"{self.model}: {self.share:.1%} of {self.macs:,} MACs have both operands quantized, "
            f"{self.share_weights:.1%} the weight"
        )
        if self.attention:
            last += f"; {self.share_products:.1%} of {self.products:,} MACs of attention products"
        return "\n".join([*lines, last])


def coverage(qmodel: nn.Module, *args: Any, **kwargs: Any) -> Coverage:
    """Run a model and say which part of its multiply-accumulates had quantized operands.

    It runs in the mode it is in, with gradients where the caller's context has them, and is afterwards what it was:
    buffers (the statistics of batch norm), attributes that forward assigned, training flags, and the generators of
    torch and Python. What forward appended to a list of its own stays. The user's hooks fire.

    An operand counts as quantized only if it is what a quantizer returned, moved about at most (reshaped, padded with
    zeros, concatenated, ...). A fused kernel counts as what it computes. A convolution always counts; a matrix product
    where one operand comes from a parameter; where both are activations, it counts as an attention product, apart.

    Args:
        qmodel: A quantized, frozen or float model.
        *args: Its inputs, on its device.
        **kwargs: Its inputs.

    Returns:
        Shares, sites and what was left alone. A float model has no plan: sites are named after their layers.

    Example:
        >>> import daqconvert as dq
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1))
        >>> qmodel, x = dq.quantize(model, w_bits=4, a_bits=4, exclude="2"), torch.rand(1, 3, 8, 8)
        >>> report = dq.calibrate(qmodel, [x])
        >>> counted = dq.coverage(qmodel, x)
        >>> counted["0"].macs, counted["2"].macs, round(counted.share, 3)
        (7776, 2304, 0.771)
    """
    model = _unwrapped(qmodel)
    plan = current_plan(model) if isinstance(getattr(model, PLAN_ATTRIBUTE, None), Plan) else None
    torch.clear_autocast_cache()  # a weight that was cast before would come from nowhere
    with unchanged(model), _eager(model), counting(model, (args, kwargs)) as counter:
        model(*args, **kwargs)
    weighted = assign([event for event in counter.events if not event.attention], plan)
    reasons = {row.name: row.reason for row in plan.skipped} if plan is not None else {}
    return Coverage(
        type(model).__name__,
        _grouped([((site, ""), e) for e, site in weighted if site is not None], reasons),
        _grouped([((next(iter(e.tensors), ""), e.module), e) for e, site in weighted if site is None]),
        plan.skipped if plan is not None else (),
        _grouped([(("", e.module), e) for e in counter.events if e.attention]),
    )


def _grouped(
    placed: list[tuple[tuple[str, str], Event]], reasons: dict[str, str] | None = None
) -> tuple[SiteCount, ...]:
    groups: dict[tuple[str, str], list[Event]] = {}
    for place, event in placed:
        groups.setdefault(place, []).append(event)
    return tuple(
        SiteCount(
            name=name,
            macs=sum(e.macs for e in found),
            weight=sum(e.macs for e in found if e.w_quantized),
            input=sum(e.macs for e in found if e.x_quantized),
            both=sum(e.macs for e in found if e.w_quantized and e.x_quantized),
            module=found[0].module,
            op=found[0].op,
            reason=(reasons or {}).get(name, ""),
        )
        for (name, _), found in groups.items()
    )


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Let a model run and give back its buffers, attributes and modes, and the state of the random generators."""
    attributes = [(module, dict(vars(module))) for module in model.modules()]
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    values = {id(b): (b, b.detach().clone()) for _, held in buffers for b in held.values() if b is not None}
    state = random.getstate()
    devices = {t.device.index for t in (*model.parameters(), *model.buffers()) if t.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=sorted(d for d in devices if d is not None)):
            yield
    finally:
        random.setstate(state)
        for module, before in attributes:
            vars(module).clear()
            vars(module).update(before)
        for module, held in buffers:
            module._buffers.clear()
            module._buffers.update(held)
        with torch.no_grad():
            for buffer, value in values.values():
                if not (buffer.is_meta or torch.equal(buffer, value)):  # NOTE: no write without need: autograd counts
                    buffer.copy_(value)


@contextmanager
def _eager(model: nn.Module) -> Iterator[None]:
    """Run compiled modules as they were written: inside a compiled graph there are no operators to see."""
    compiled = any(m._compiled_call_impl is not None or "_orig_mod" in m._modules for m in model.modules())
    with ExitStack() as stack:
        if compiled:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(warnings.catch_warnings())  # hooks fire once more for the wrapper: harmless here
            warnings.filterwarnings("ignore", "Using `torch.compile\\(module\\)` when there are global hooks")
        yield


def _unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside `torch.compile` and `DistributedDataParallel`."""
    while True:
        inner = model._modules.get("_orig_mod")
        if inner is None and isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        if inner is None:
            return model
        model = inner


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _path(row: SiteCount) -> str:
    return row.module or "(root)"


def _text(row: SiteCount, name: str, remarks: str) -> tuple[str, str, str, str, str, str]:
    return (name, row.op, f"{row.macs:,}", _side(row.weight, row.macs), _side(row.input, row.macs), remarks)


def _side(quantized: int, macs: int) -> str:
    return "float" if not quantized else "quantized" if quantized == macs else f"{quantized / macs:.0%}"
