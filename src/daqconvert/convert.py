"""The verbs `plan` and `quantize`: a model and a policy in; a Plan, or a model with quantized layers, out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from daqconvert.errors import ConversionError, FrozenError
from daqconvert.graph import apply_sites, find_sites
from daqconvert.layers.frozen_site import FrozenSite
from daqconvert.layers.site import QuantizedSite
from daqconvert.models import copy_model, quantized_layers
from daqconvert.policy.arguments import UNSET, build
from daqconvert.policy.resolve import resolve
from daqconvert.spec import Plan, Policy

PLAN_ATTRIBUTE = "_daqconvert_plan"


def plan(
    model: nn.Module, *, policy: Policy | str | Path | dict[str, Any] | None = None, preset: str | None = None,
    first: Any = UNSET, last: Any = UNSET, exclude: Any = (), include: Any = None, bits: Any = None, rules: Any = (),
    example_inputs: Any = None, **settings: Any,
) -> Plan:  # fmt: skip
    """Say what `quantize` would do with a model, without doing it.

    Args:
        model: Any module, not changed; a quantized or frozen model gives the plan it was made with.
        policy: A `Policy`, the path of a TOML file, or a dict of the same form.
        preset: Name of a preset, as `"paper-w1a1"`; not together with `policy`.
        first: Bits of the first sites: `(w, a)`, a dict of settings, or None for float; default 8/8.
        last: Likewise for the last sites.
        exclude: Names, globs or `re:` patterns of layers to leave alone.
        include: Names, globs or `re:` patterns of the only layers to convert, instead of the policy's own.
        bits: Name or pattern -> bits: a number for both, `(w, a)`, or None for float; rules after all others.
        rules: `Rule` objects, after those of the policy.
        example_inputs: Gives MACs: a tensor, a tuple of positional or a dict of keyword arguments.
        **settings: Any field of `Settings`: `w_bits`, `a_bits`, `granularity`, `rounding`, ...

    Returns:
        One row per convolution and linear, printable.

    Raises:
        PolicyError: If a setting, rule or width cannot be applied; names the nearest valid name.
        ConversionError: If the model cannot be copied or fails on the example inputs, or is quantized already and
            anything but its plan is asked for.

    Example:
        >>> import daqconvert as dq
        >>> rows = dq.plan(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), w_bits=4, a_bits=4)
        >>> [(row.name, row.rule) for row in rows]
        [('0', 'first'), ('2', 'last')]
    """
    if getattr(model, PLAN_ATTRIBUTE, None) is not None:
        given = {"policy": policy, "preset": preset, "exclude": exclude or None, "rules": rules or None}
        given |= {"include": include, "bits": bits}
        given |= {key: None if value is UNSET else key for key, value in (("first", first), ("last", last))}
        asked = [*(key for key, value in given.items() if value is not None), *settings]
        if asked:
            raise ConversionError(
                f"plan: {type(model).__name__} is quantized already and its plan is fixed; found {', '.join(asked)}. "
                "Leave that out to see its plan, or plan the original float model."
            )
        return current_plan(model)
    chosen = build(
        policy=policy, preset=preset, first=first, last=last, exclude=exclude, include=include, bits=bits, rules=rules,
        **settings,
    )  # fmt: skip
    found = find_sites(model, example_inputs)
    return resolve(
        chosen, found.sites, model=type(model).__name__, order=found.order,
        other_params=found.other_params, input_size=found.input_size,
        sums=found.sums,
    )  # fmt: skip


def quantize(
    model: nn.Module, *, w_bits: Any = UNSET, a_bits: Any = UNSET, policy: Any = None, preset: str | None = None,
    first: Any = UNSET, last: Any = UNSET, exclude: Any = (), include: Any = None, bits: Any = None, rules: Any = (),
    example_inputs: Any = None, **settings: Any,
) -> Any:  # fmt: skip
    """Return a copy of a model whose convolutions and linears are quantized; needs no data.

    Each layer keeps its `weight` and `bias`; beside them come `weight_quantizer`, `input_quantizer` and
    `output_scale`. Bounds of weights are set from the weights, bounds of inputs by `calibrate` (or `finetune`).

    Args:
        model: Any module; it is not changed.
        w_bits: Bits of the weights, 1 to 8, or None (32) for float; default 8.
        a_bits: Bits of the inputs, likewise.
        policy: A `Policy`, the path of a TOML file, or a dict of the same form.
        preset: Name of a preset, as `"paper-w1a1"`; not together with `policy`.
        first: Bits of the first sites: `(w, a)`, a dict of settings, or None for float; default 8/8.
        last: Likewise for the last sites.
        exclude: Names, globs or `re:` patterns of layers to leave alone.
        include: Names, globs or `re:` patterns of the only layers to convert, instead of the policy's own.
        bits: Name or pattern -> bits: a number for both, `(w, a)`, or None for float; rules after all others.
        rules: `Rule` objects, after those of the policy.
        example_inputs: Gives the plan's MACs; not needed.
        **settings: Any other field of `Settings`.

    Returns:
        A model of the same class, device and dtype; `daqconvert.plan(qmodel)` prints what was done.

    Raises:
        PolicyError: If a setting, rule or width cannot be applied.
        ConversionError: If the model is quantized already, has nothing to convert, or a weight is empty, not finite,
            or constant where it must be normalized.
        FrozenError: If the model is frozen.

    Reference: "Distance-aware Quantization" (Kim, Lee, Ham, ICCV 2021).

    Example:
        >>> import daqconvert as dq
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.LazyLinear(2))
        >>> qmodel = dq.quantize(nn.Sequential(*model[:3]), w_bits=4, a_bits=4, last=None)
        >>> type(qmodel[0]).__name__, type(qmodel[2]).__name__
        ('QuantConv2d', 'Conv2d')
    """
    require_float(model, "quantize")
    if w_bits is not UNSET:
        settings["w_bits"] = w_bits
    if a_bits is not UNSET:
        settings["a_bits"] = a_bits
    chosen = plan(
        model, policy=policy, preset=preset, first=first, last=last, exclude=exclude, include=include, bits=bits,
        rules=rules, example_inputs=example_inputs, **settings,
    )  # fmt: skip
    if not chosen.converted:
        raise ConversionError(
            f"{type(model).__name__}: nothing to quantize: {len(chosen)} convolutions and linears found, all left "
            "alone. Print daqconvert.plan(model, ...) for the reasons."
        )
    return apply_plan(copy_model(model), chosen)


def apply_plan(model: nn.Module, chosen: Plan) -> nn.Module:
    """Convert the layers of a model in place as the plan says, and remember the plan."""
    apply_sites(model, chosen.converted)
    sites = {site.layer_name: site for site in quantized_layers(model).values()}
    for name, leader in chosen.input_groups().items():
        sites[name].input_quantizer = sites[leader].input_quantizer
    object.__setattr__(model, PLAN_ATTRIBUTE, chosen)
    return model


def current_plan(model: nn.Module) -> Plan:
    """Return the plan of a quantized or frozen model, with the signs that `calibrate` has decided since.

    Raises:
        ConversionError: If the model is not quantized.
    """
    chosen = getattr(model, PLAN_ATTRIBUTE, None)
    if not isinstance(chosen, Plan):
        raise ConversionError(
            f"{type(model).__name__}: expected a model made by daqconvert.quantize, found one without a plan."
        )
    layers = {layer.layer_name: layer for layer in quantized_layers(model).values()}
    rows = []
    for row in chosen.rows:
        layer = layers.get(row.name)
        if layer is not None and layer.input_quantizer is not None:
            row = dataclasses.replace(row, signed=layer.input_quantizer.sign)
        rows.append(row)
    return dataclasses.replace(chosen, rows=tuple(rows))


def require_float(model: nn.Module, verb: str) -> None:
    """Raise if a model is quantized or frozen already."""
    for name, module in model.named_modules():
        if isinstance(module, FrozenSite):
            raise FrozenError(f"{verb}: {name or 'the model'} is frozen; {verb} needs the original float model.")
        if isinstance(module, QuantizedSite):
            raise ConversionError(
                f"{verb}: {name or 'the model'} is quantized already ({module.extra_repr()}). "
                f"Call {verb} on the original float model."
            )


def require_quantized(model: nn.Module, verb: str) -> dict[str, QuantizedSite]:
    """Return the quantized layers by name; raise if there are none or the model is frozen."""
    for name, module in model.named_modules():
        if isinstance(module, FrozenSite):
            raise FrozenError(
                f"{verb}: {name or 'the model'} is frozen: it holds integer codes and no trainable weights. "
                f"Call {verb} on the quantized model it was frozen from."
            )
    layers = quantized_layers(model)
    if not layers:
        raise ConversionError(
            f"{verb}: {type(model).__name__} has no quantized layer. Call daqconvert.quantize(model, ...) first."
        )
    return layers


def load_float(qmodel: nn.Module, state_dict: dict[str, Tensor]) -> nn.Module:
    """Load a float model's state dict into a quantized model, strictly, and mark its bounds uncalibrated.

    Args:
        qmodel: A quantized model, changed in place.
        state_dict: Of the float model: every key, and no key of a quantizer.

    Returns:
        The same model; its bounds, and the signs that were read from data, wait for `calibrate` (or `finetune`).

    Raises:
        ConversionError: If a key is missing, unexpected, or of another shape; nothing is loaded then.

    Example:
        >>> import daqconvert as dq
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> qmodel = dq.load_float(dq.quantize(model, w_bits=4, a_bits=4), model.state_dict())
    """
    layers = require_quantized(qmodel, "load_float")
    everywhere = qmodel.named_modules(remove_duplicate=False)  # a layer under two names has its keys under both
    own = {f"{name}." if name else "" for name, module in everywhere if isinstance(module, QuantizedSite)}
    quantizers = {p + key for p in own for key in ("weight_quantizer", "input_quantizer", "output_scale")}
    state = qmodel.state_dict()
    current = {key: value for key, value in state.items() if not any(o in quantizers for o in _outer(key))}
    problems = [f"missing {key}" for key in current if key not in state_dict]
    problems += [f"unexpected {key}" for key in state_dict if key not in current]
    problems += [
        f"{key}: expected shape {tuple(value.shape)}, found {tuple(state_dict[key].shape)}"
        for key, value in current.items()
        if key in state_dict and state_dict[key].shape != value.shape
    ]
    problems += [
        f"{name} is on the meta device and in no state dict: build the model on the CPU, or fill it in first"
        for name, tensor in qmodel.named_buffers()
        if tensor.is_meta and name not in state_dict and not any(o in quantizers for o in _outer(name))
    ]
    if problems:
        raise ConversionError(
            f"load_float: the state dict does not fit {type(qmodel).__name__}: {'; '.join(problems[:3])}"
            f"{f'; and {len(problems) - 3} more' if len(problems) > 3 else ''}. It must be the float model's."
        )
    qmodel.load_state_dict(state_dict, strict=False, assign=any(v.is_meta for v in current.values()))
    known = {row.name: row.signed for row in getattr(qmodel, PLAN_ATTRIBUTE, ())}
    for layer in layers.values():
        layer.leave_meta()
        if layer.weight_quantizer is not None:
            layer.weight_quantizer.mark(False)
        if layer.input_quantizer is not None:
            layer.input_quantizer.forget(known.get(layer.layer_name, layer.input_quantizer.sign))
    return qmodel


def _outer(key: str) -> Iterator[str]:
    """Yield a state dict's key, and the dotted names of the modules that it is inside of."""
    while key:
        yield key
        key = key.rpartition(".")[0]
