"""The checks on one network of the zoo; each gives values for the network's record, or an error text.

Two copies of the prepared network are compared: the float one and the one that `dq.quantize` made of it, W8A8 by
default settings, calibrated on four random batches. SQNR is measured on batches of another seed. All other comparisons
are exact (`torch.equal` on every tensor of the output).
"""

from __future__ import annotations

import copy
import random
import resource
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import daqconvert as dq
from benchmarks import common
from benchmarks.zoo.zoo_gradients import compare_gradients
from benchmarks.zoo.zoo_models import Network, call, everything, floating, inputs, leaves
from benchmarks.zoo.zoo_prepare import prepared

CALIBRATION = (1, 2, 3, 4)
EVALUATION = (11, 12)
Record = dict[str, Any]


def run_all(network: Network, save: Callable[[Record], None]) -> Record:
    """Run every check in order, `save` the record after each, and return it; a check that raises stops no other."""
    record: Record = {"group": network.group, "task": network.task, "family": network.family,
                      "params": network.params, "size": list(network.size)}  # fmt: skip
    state = State(network)
    for name, check in CHECKS.items():
        if state.qmodel is None and name not in ("float", "converts"):
            break
        started = time.perf_counter()
        try:
            record[name] = check(state)
        except Exception as error:
            record[name] = {"error": common.told(error, 400)}
        record.setdefault("took", {})[name] = round(time.perf_counter() - started, 2)
        record["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        save(record)
    return record


class State:
    """The models of one network while it is checked.

    Attributes:
        network: Which network.
        model: The prepared float model, in evaluation mode.
        qmodel: The quantized model, or None until it is made.
        frozen: The frozen model, or None.
    """

    def __init__(self, network: Network) -> None:
        self.network = network
        self.model: nn.Module = nn.Identity()
        self.qmodel: nn.Module | None = None
        self.frozen: nn.Module | None = None

    @property
    def quantized(self) -> nn.Module:
        """The quantized model in evaluation mode."""
        assert self.qmodel is not None
        return self.qmodel.eval()

    def batch(self, seed: int, *, train: bool = False) -> Any:
        """Return the batch of a seed."""
        return inputs(self.network, seed, train=train)


def seeded(function: Callable[[], Any]) -> Any:
    """Call a function with a fixed random state, so that dropout and sampling draw the same in both models."""
    torch.manual_seed(5)
    random.seed(5)
    return function()


def equal(left: list[Tensor], right: list[Tensor]) -> Record:
    """Say whether two lists of tensors are identical, and how far they are apart where not."""
    if [t.shape for t in left] != [t.shape for t in right]:
        return {"ok": False, "why": f"{len(left)} and {len(right)} outputs, or other shapes"}
    differing = sum(int((a != b).sum()) for a, b in zip(left, right, strict=True))
    if all(torch.equal(a, b) for a, b in zip(left, right, strict=True)):
        return {"ok": True}
    finite = all(bool(t.isfinite().all()) for t in left if t.is_floating_point())
    largest = max(float((a.double() - b.double()).abs().max()) for a, b in zip(left, right, strict=True) if a.numel())
    return {"ok": False, "elements": sum(t.numel() for t in left), "differing": differing, "largest": largest,
            "finite": finite}  # fmt: skip


def check_float(state: State) -> Record:
    """Build and prepare the network; its output must be finite and not constant.

    `gain_db` says how much the float network amplifies an error: noise 60 dB below the input is added, and the gain is
    60 minus the SQNR of its output. Deep random networks with batch norm amplify a lot: at a gain of 40 or so, even
    rounding the input to 8 bits would leave less than 20 dB.
    """
    state.model = prepared(state.network)
    batch = state.batch(EVALUATION[0])
    with torch.no_grad():
        output = floating(state.model, batch)
        noisy = floating(state.model, tree_map(_disturbed, batch))
    signal = sum(float(t.double().square().sum()) for t in output)
    noise = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(output, noisy, strict=True))
    finite = all(bool(t.isfinite().all()) for t in output)
    varies = all(float(t.double().std()) > 0 for t in output if t.numel() > 1)
    gain = round(60.0 - decibel(signal, noise), 1) if finite else None
    return {"ok": finite and varies, "outputs": len(output), "finite": finite, "varies": varies, "gain_db": gain}


def _disturbed(value: Any) -> Any:
    """Return a floating tensor with seeded noise 60 dB below it, anything else as it is."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    drawn = torch.randn(value.shape, generator=torch.Generator().manual_seed(3))
    return value + 1e-3 * value.square().mean().sqrt() * drawn


def check_converts(state: State) -> Record:
    """Quantize with the defaults, and count the sites."""
    started = time.perf_counter()
    qmodel = dq.quantize(state.model)
    seconds = round(time.perf_counter() - started, 2)
    plan = dq.plan(qmodel)
    reasons = Counter(row.reason or "no reason given" for row in plan.skipped)
    state.qmodel = qmodel
    return {"ok": isinstance(qmodel, type(state.model)), "seconds": seconds, "sites": len(plan),
            "converted": len(plan.converted), "order": plan.order, "skipped": dict(reasons)}  # fmt: skip


def check_calibrates(state: State) -> Record:
    """Calibrate on random batches, read once from an iterator."""
    started = time.perf_counter()
    report = dq.calibrate(state.quantized, (state.batch(seed) for seed in CALIBRATION))
    return {"ok": True, "seconds": round(time.perf_counter() - started, 2), "inputs": len(report.inputs),
            "unseen": list(report.unseen)[:8]}  # fmt: skip


@torch.no_grad()
def check_identical(state: State) -> Record:
    """Compare the disabled quantized model with the original in evaluation mode."""
    batch = state.batch(EVALUATION[0])
    with dq.disabled(state.quantized):
        return equal(everything(state.model, batch), everything(state.quantized, batch))


@torch.no_grad()
def check_identical_train(state: State) -> Record:
    """Compare both models in training mode, on copies, because the statistics of batch norms change."""
    model, qmodel = copy.deepcopy(state.model).train(), copy.deepcopy(state.quantized).train()
    batch = state.batch(EVALUATION[0], train=True)
    try:
        expected = seeded(lambda: everything_in_training(model, batch))
    except Exception as error:
        return {"ok": True, "why": f"the original cannot be run in training mode: {common.told(error, 400)}"}
    with dq.disabled(qmodel):
        return equal(expected, seeded(lambda: everything_in_training(qmodel, batch)))


def everything_in_training(model: nn.Module, batch: Any) -> list[Tensor]:
    """Return outputs in training mode and the statistics that the pass left behind."""
    output = leaves(call(model, batch))
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    return output + [m.running_var for m in norms if m.running_var is not None]


def check_coverage(state: State) -> Record:
    """Count the multiply-accumulates whose operands were quantized."""
    batch = state.batch(EVALUATION[0])
    positional = () if isinstance(batch, dict) else (batch,)
    found = dq.coverage(state.quantized, *positional, **(batch if isinstance(batch, dict) else {}))
    return coverage_record(found, state.quantized)


def coverage_record(found: Any, model: nn.Module) -> Record:
    """Return what `dq.coverage` found as plain values; `ok` from 99.5 % on, not counting recurrent layers."""
    recurrent = {n for n, m in model.named_modules() if isinstance(m, (nn.RNNBase, nn.RNNCellBase))}
    rows = [*found.sites, *found.unassigned]
    counted = [row for row in rows if row.name not in recurrent and row.module not in recurrent]
    macs = sum(row.macs for row in counted)
    aside = sum(row.both for row in counted) / macs if macs else 1.0
    left = sorted((row for row in rows if row.both < row.macs), key=lambda row: row.both - row.macs)
    return {"ok": aside >= 0.995, "share": round(found.share, 6), "share_weights": round(found.share_weights, 6),
            "share_aside": round(aside, 6), "macs": found.macs, "macs_recurrent": found.macs - macs,
            "macs_products": found.products, "left": [_left(row, found.macs) for row in left[:8]]}  # fmt: skip


def _left(row: Any, macs: int) -> str:
    """Return what is not quantized at one place, in words."""
    operands = [kind for kind in ("weight", "input") if not getattr(row, f"{kind}_quantized")]
    place = row.name or f"a product in {row.module or 'the model'}"
    why = row.reason or f"{' and '.join(operands)} not quantized"
    return f"{place} ({row.op}, {(row.macs - row.both) / macs:.2%}): {why}"[:200]


@torch.no_grad()
def check_sqnr(state: State) -> Record:
    """Signal to quantization noise of the floating outputs in dB: over all, of the worst output, and `varying_db`.

    In `varying_db` the signal is only what differs between samples: where most of a random network's output is a
    constant bias, the plain SQNR is too good.
    """
    pairs = []
    for seed in EVALUATION:
        batch = state.batch(seed)
        pairs.append(list(zip(floating(state.model, batch), floating(state.quantized, batch), strict=True)))
    each, varying = [], 0.0
    for both in zip(*pairs, strict=True):
        signal = sum(float(a.double().square().sum()) for a, _ in both)
        noise = sum(float((a.double() - b.double()).square().sum()) for a, b in both)
        each.append((signal, noise))
        samples = torch.cat([a.double() for a, _ in both])
        varying += float((samples - samples.mean(0)).square().sum())
    worst = min(range(len(each)), key=lambda i: decibel(*each[i]))
    total = decibel(sum(s for s, _ in each), sum(n for _, n in each))
    varying_db = round(decibel(varying, sum(n for _, n in each)), 2)
    return {"ok": total >= 20.0, "db": round(total, 2), "varying_db": varying_db,
            "worst_db": round(decibel(*each[worst]), 2), "worst_output": worst, "outputs": len(each)}  # fmt: skip


def decibel(signal: float, noise: float) -> float:
    """Return `10 log10(signal / noise)`; 200 where there is no noise."""
    if noise == 0.0:
        return 200.0
    return float(10 * torch.log10(torch.tensor(signal / noise, dtype=torch.float64))) if signal > 0 else -200.0


def check_gradients(state: State) -> Record:
    """Compare which gradients exist after one step in training mode, and which quantizers ran in each mode."""
    return compare_gradients(state.model, state.quantized, lambda train: state.batch(21, train=train), seeded)


@torch.no_grad()
def check_frozen(state: State) -> Record:
    """Compare the frozen model with the quantized one in evaluation mode."""
    started = time.perf_counter()
    state.frozen = dq.freeze(state.quantized)
    seconds = round(time.perf_counter() - started, 2)
    batch = state.batch(EVALUATION[0])
    return {**equal(everything(state.quantized, batch), everything(state.frozen, batch)), "seconds": seconds}


@torch.no_grad()
def check_saved(state: State) -> Record:
    """Save, load with the float model as skeleton, compare outputs; save again, compare files."""
    if state.frozen is None:
        return {"error": "not frozen"}
    batch = state.batch(EVALUATION[0])
    with tempfile.TemporaryDirectory() as folder:
        first = dq.save(state.frozen, Path(folder) / "first")
        loaded = dq.load(first, model=state.model)
        second = dq.save(loaded, Path(folder) / "second")
        files = sorted(path.name for path in first.iterdir())
        same = files == sorted(p.name for p in second.iterdir()) and all(
            (first / name).read_bytes() == (second / name).read_bytes() for name in files
        )
        size = sum((first / name).stat().st_size for name in files)
    found = equal(everything(state.frozen, batch), everything(loaded, batch))
    return {**found, "ok": found["ok"] and same, "files": same, "megabytes": round(size / 1e6, 2)}


CHECKS: dict[str, Callable[[State], Record]] = {
    "float": check_float,
    "converts": check_converts,
    "calibrates": check_calibrates,
    "identical": check_identical,
    "identical_train": check_identical_train,
    "coverage": check_coverage,
    "sqnr": check_sqnr,
    "gradients": check_gradients,
    "frozen": check_frozen,
    "saved": check_saved,
}
