"""The verb `coverage`: how much of what a model multiplies was quantized, counted while it ran."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from daqconvert.convert import PLAN_ATTRIBUTE, current_plan
from daqconvert.macs import Event, assign, counting, eager
from daqconvert.spec import Plan, PlanRow
from daqconvert.spec.text_table import text_table


@dataclass(frozen=True)
class SiteCount:
    """What ran at one site, or at one place that is not a site.

    Attributes:
        name: Name of the site in the plan. If the weight belongs to no site, name of the weight's parameter or buffer,
            or empty if it has no name.
        macs: Multiply-accumulates, for the whole batch.
        weight: How many of `macs` had a quantized weight (in an attention product: second operand).
        input: How many of `macs` had a quantized input (in an attention product: first operand).
        both: How many of `macs` had both quantized.
        module: Dotted name of the module that was running.
        op: Name of torch's operator, such as `"addmm"`; the first one if several ran.
        reason: Why the plan leaves the site in float; empty if the plan quantizes it.
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
    """What `coverage` counted. It prints as a table.

    Attributes:
        model: Class name of the model.
        sites: One count for each site that ran, in order of execution.
        unassigned: Counts of products with a weight that belong to no site of the plan.
        skipped: The rows of the plan that stay in float, each with its reason, whether they ran or not.
        attention: Counts of products of two activations, one for each module. They are not part of `macs`.

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
        """Share of `macs`, 0 to 1, that had both operands quantized."""
        return _ratio(sum(row.both for row in self._weighted), self.macs)

    @property
    def share_weights(self) -> float:
        """Share of `macs`, 0 to 1, that had a quantized weight."""
        return _ratio(sum(row.weight for row in self._weighted), self.macs)

    @property
    def products(self) -> int:
        """Multiply-accumulates of attention products, whose operands are both activations."""
        return sum(row.macs for row in self.attention)

    @property
    def share_products(self) -> float:
        """Share of `products`, 0 to 1, that had both operands quantized."""
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
        last = (
            f"{self.model}: {self.share:.1%} of {self.macs:,} MACs have both operands quantized, "
            f"{self.share_weights:.1%} the weight"
        )
        if self.attention:
            last += f"; {self.share_products:.1%} of {self.products:,} MACs of attention products"
        return "\n".join([*text_table(rows, right={2, 3, 4}), last])


def coverage(qmodel: nn.Module, *args: Any, **kwargs: Any) -> Coverage:
    """Run a model once and count how many of its multiply-accumulates had quantized operands.

    The model runs in its current mode (training or evaluation), and the user's hooks fire. Afterwards the following
    are restored: buffers such as the statistics of batch norm, attributes that a forward assigned, training flags, and
    the random generators of torch and Python. Not restored: what a forward appended to a list of the model.

    An operand counts as quantized only if a quantizer returned its values; they may have been reshaped, padded with
    zeros, concatenated and the like since. Every convolution counts, and every matrix product that has an operand
    computed from a parameter. A matrix product of two activations is counted separately, as an attention product. A
    fused kernel counts as the products that it computes.

    Args:
        qmodel: A quantized, frozen or float model.
        *args: Positional arguments of its forward, on its device.
        **kwargs: Keyword arguments of its forward.

    Returns:
        The counts of each site, their shares of the whole, and what the plan leaves in float. A float model has no
        plan; its sites are named after its layers.

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
    torch.clear_autocast_cache()  # NOTE: otherwise a weight cast before this run would have no known origin
    with unchanged(model), eager(model), counting(model, (args, kwargs)) as counter:
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
    """Restore a model's buffers, attributes and modes, and the random generators, at the end of the context."""
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
                # NOTE: equal buffers are not written, because autograd counts writes
                if not (buffer.is_meta or torch.equal(buffer, value)):
                    buffer.copy_(value)


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
