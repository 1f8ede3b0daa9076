"""Gradients of a quantized network against those of the float one, and which quantizers run in which mode.

There is one backward pass of a random projection of the outputs (for a detector, of the sum of the losses) in training
mode, or in evaluation mode if the original cannot run in training mode. Every gradient must be finite. For every
weight of a site whose gradient is non-zero in the float model, the quantized model must have non-zero gradients of the
weight, of the bounds of its weight quantizer and of the upper bound of its input quantizer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import daqconvert as dq
from benchmarks.zoo.zoo_models import call, is_detector, leaves
from daqconvert.quantizers.base import Quantizer

SHOWN = 6
Batch = Callable[[bool], Any]
Seeded = Callable[[Callable[[], Any]], Any]


def compare_gradients(model: nn.Module, qmodel: nn.Module, batch: Batch, seeded: Seeded) -> dict[str, Any]:
    """Return the comparison as a record.

    Args:
        model: The float model; not changed.
        qmodel: The quantized and calibrated model; not changed.
        batch: Function that returns a batch, with True one for training mode.
        seeded: Function that calls another one with a fixed random state.
    """
    trained, train = copy.deepcopy(model).train(), True
    try:
        ran_float = seeded(lambda: backward(trained, batch(True)))
    except Exception:
        trained, train = copy.deepcopy(model).eval(), False
        ran_float = seeded(lambda: backward(trained, batch(False)))
    expected = {name: p.grad for name, p in trained.named_parameters() if _any(p.grad)}
    qtrained = copy.deepcopy(qmodel).train(train)
    ran = seeded(lambda: backward(qtrained, batch(train)))
    record = {"mode": "train" if train else "eval", **_lost(qmodel, qtrained, expected)}
    record |= compare_modes(model, qmodel, ran, ran_float, batch) if train else {}
    wanted = ("not_finite", "weights", "bounds", "input_bounds", "modes")
    return {"ok": not any(record.get(key, {}).get("count") for key in wanted), **record}


def backward(model: nn.Module, batch: Any) -> set[str]:
    """Run forward and backward; return the names of the modules that ran."""
    names: set[str] = set()
    handles = [m.register_forward_hook(_noting(names, name)) for name, m in model.named_modules()]
    output = call(model, batch)
    for handle in handles:
        handle.remove()
    found = [leaf for leaf in leaves(output) if leaf.is_floating_point() and leaf.requires_grad]
    generator = torch.Generator().manual_seed(9)
    if is_detector(model) and model.training:
        loss = torch.stack([leaf.sum() for leaf in found]).sum()
    else:
        drawn = [torch.randn(leaf.shape, generator=generator) for leaf in found]
        loss = torch.stack([(leaf * r).mean() for leaf, r in zip(found, drawn, strict=True)]).sum()
    loss.backward()
    return names


def _noting(names: set[str], name: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        names.add(name)

    return hook


def _any(gradient: Tensor | None) -> bool:
    return gradient is not None and bool((gradient != 0).any())


def _lost(qmodel: nn.Module, qtrained: nn.Module, expected: dict[str, Tensor | None]) -> dict[str, Any]:
    """Name the gradients that are not finite, and those that are zero where they should not be."""
    own = dict(qtrained.named_parameters(remove_duplicate=False))
    modules = dict(qtrained.named_modules(remove_duplicate=False))
    lost: dict[str, list[str]] = {"weights": [], "bounds": [], "input_bounds": [], "others": []}
    site_weights: set[str] = set()
    unseen = 0
    for row in dq.plan(qmodel).converted:
        weights, holder = site_of(row, own, modules)
        site_weights |= set(weights)
        if not any(name in expected for name in weights):
            unseen += 1
            continue
        lost["weights"] += [name for name in weights if name in expected and not _any(own[name].grad)]
        for kind, quantizer in (("bounds", "weight_quantizer"), ("input_bounds", "input_quantizer")):
            found = getattr(holder, quantizer, None)
            if found is None or found.upper.grad is None or not _any(found.upper.grad):
                lost[kind] += [f"{row.name}.{quantizer}"] if found is not None or holder is None else []
    rest = [name for name in expected if name not in site_weights]
    lost["others"] = [name for name in rest if name not in own or not _any(own[name].grad)]
    bad = [name for name, p in own.items() if p.grad is not None and not bool(p.grad.isfinite().all())]
    record = {kind: listed(names) for kind, names in (("not_finite", bad), *lost.items())}
    return {**record, "with_gradient": len(expected), "sites_without": unseen}


def site_of(row: Any, own: dict[str, Any], modules: dict[str, nn.Module]) -> tuple[list[str], nn.Module | None]:
    """Return the names of the parameters of a site's weight, and the module that holds its quantizers."""
    called = getattr(row.site, "call", None)
    if called is not None:
        names = [name for name in called.tensors if name in own]
        return names, modules.get(called.holder)
    prefix = f"{row.name}." if row.name else ""
    names = [n for n in (f"{prefix}weight", f"{prefix}in_proj_weight") if n in own]
    names += [n for n in own if n.startswith((f"{prefix}parametrizations.weight.", f"{prefix}weight_"))
              and "quantizer" not in n]  # fmt: skip
    return names, modules.get(row.name)


def listed(names: list[str]) -> dict[str, Any]:
    """Return the number of names, and the first few."""
    return {"count": len(names), "first": names[:SHOWN]} if names else {"count": 0}


def compare_modes(
    model: nn.Module, qmodel: nn.Module, trained: set[str], float_trained: set[str], batch: Batch
) -> dict[str, Any]:
    """Compare the quantizers that ran in training, in evaluation and without gradients.

    A quantizer inside a module that runs in only one of the modes in the float model too (an auxiliary head) does not
    count as a difference.
    """
    ran: dict[str, set[str]] = {"train": trained}
    for mode, grad in (("eval", True), ("no_grad", False)):
        with torch.set_grad_enabled(grad):
            ran[mode] = ran_modules(qmodel.eval(), batch(False))
    with torch.no_grad():
        float_eval = ran_modules(model.eval(), batch(False))
    one_mode = float_trained ^ float_eval
    quantizers = {name for name, m in qmodel.named_modules() if isinstance(m, Quantizer)}
    sets = {mode: names & quantizers for mode, names in ran.items()}
    differing = sorted((sets["train"] ^ sets["eval"]) | (sets["eval"] ^ sets["no_grad"]))
    differing = [name for name in differing if not any(_inside(name, module) for module in one_mode)]
    return {"modes": listed(differing), "quantizers": {mode: len(names) for mode, names in sets.items()}}


def ran_modules(model: nn.Module, batch: Any) -> set[str]:
    """Return the names of the modules that run."""
    names: set[str] = set()
    handles = [m.register_forward_hook(_noting(names, name)) for name, m in model.named_modules()]
    try:
        call(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return names


def _inside(name: str, module: str) -> bool:
    return bool(module) and (name == module or name.startswith(f"{module}."))
