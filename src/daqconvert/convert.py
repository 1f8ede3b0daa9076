"""The verbs `plan`, `quantize` and `load_float`, and checks that a model is float, or quantized and not frozen.

`plan` decides and changes nothing, `quantize` applies the plan to a copy of the model and keeps it with the copy, and
`load_float` fills a quantized model with the weights of a float one.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from daqconvert.errors import ConversionError, FrozenError
from daqconvert.graph import apply_sites, find_sites
from daqconvert.kept_plan import PLAN_ATTRIBUTE as PLAN_ATTRIBUTE
from daqconvert.kept_plan import current_plan as current_plan
from daqconvert.kept_plan import keep_plan, plan_owners
from daqconvert.layers.call_holders import CallHolder
from daqconvert.layers.frozen_site import FrozenSite
from daqconvert.layers.site import QuantizedSite
from daqconvert.models import check_before_loading, copy_model, note_after_loading, quantized_sites
from daqconvert.policy.arguments import UNSET, build
from daqconvert.policy.resolve import resolve
from daqconvert.spec import Plan, Policy


def plan(
    model: nn.Module, *, policy: Policy | str | Path | dict[str, Any] | None = None, preset: str | None = None,
    first: Any = UNSET, last: Any = UNSET, exclude: Any = (), include: Any = None, bits: Any = None, rules: Any = (),
    target: str | None = None, example_inputs: Any = None, **settings: Any,
) -> Plan:  # fmt: skip
    """Say what `quantize` would do with a model, without doing it.

    Args:
        model: Any module; it is not changed. A quantized or frozen model gives the plan that it was made with.
        policy: A `Policy`, the path of a TOML file, or a dict of the same form.
        preset: Name of a preset, such as `"paper-w1a1"`, instead of a policy.
        first: Bits of the first sites: `(w, a)`, a dict of settings, or None for float. The default is 8/8.
        last: Bits of the last sites, given as for `first`. The default is 8/8.
        exclude: Names, globs or `re:` patterns of sites to leave in float.
        include: Names, globs or `re:` patterns of the only sites to convert; replaces the policy's `include`.
        bits: Maps names or patterns to bits: a number for weight and input, `(w, a)`, or None for float. These rules
            come after all others and override them.
        rules: `Rule` objects that come after those of the policy.
        target: Name of the runtime to quantize for, such as `"tensorrt"` or `"litert"`; `docs/policies.md` lists them.
            All outputs are codes, as with `deploy="integer"`, in the form that the runtime asks for.
        example_inputs: Inputs to count multiply-accumulates with: a tensor, a tuple of positional arguments or a dict
            of keyword arguments.
        **settings: Any field of `Settings`: `w_bits`, `a_bits`, `granularity`, `rounding`, ...

    Returns:
        The plan. It has one row for each site and prints as a table.

    Raises:
        PolicyError: If a setting, rule or width cannot be applied. The message names the nearest valid name.
        ConversionError: If the model cannot be copied or fails on the example inputs; or if it is quantized already
            and a policy or setting is given.

    Example:
        >>> import daqconvert as dq
        >>> rows = dq.plan(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), w_bits=4, a_bits=4)
        >>> [(row.name, row.rule) for row in rows]
        [('0', 'first'), ('2', 'last')]
    """
    if any(isinstance(module, (QuantizedSite, FrozenSite)) for module in model.modules()) or plan_owners(model):
        given = {"policy": policy, "preset": preset, "exclude": exclude or None, "rules": rules or None}
        given |= {"include": include, "bits": bits, "target": target}
        given |= {key: None if value is UNSET else key for key, value in (("first", first), ("last", last))}
        asked = [*(key for key, value in given.items() if value is not None), *settings]
        if asked:
            raise ConversionError(
                f"plan: {type(model).__name__} is quantized already and its plan is fixed; found {', '.join(asked)}. "
                "Leave that out to see its plan, or plan the original float model."
            )
        return current_plan(model, "plan")
    chosen = build(
        policy=policy, preset=preset, first=first, last=last, exclude=exclude, include=include, bits=bits, rules=rules,
        target=target, **settings,
    )  # fmt: skip
    found = find_sites(model, example_inputs)
    return resolve(
        chosen, found.sites, model=type(model).__name__, order=found.order,
        other_params=found.other_params, input_size=found.input_size,
        sums=found.outputs.sums, concats=found.outputs.concats, operators=found.outputs.operators,
    )  # fmt: skip


def quantize(
    model: nn.Module, *, w_bits: Any = UNSET, a_bits: Any = UNSET, policy: Any = None, preset: str | None = None,
    first: Any = UNSET, last: Any = UNSET, exclude: Any = (), include: Any = None, bits: Any = None, rules: Any = (),
    target: str | None = None, example_inputs: Any = None, **settings: Any,
) -> Any:  # fmt: skip
    """Return a copy of a model whose convolutions and linears are quantized. No data is needed.

    Each layer keeps its `weight` and `bias` and gets a `weight_quantizer`, an `input_quantizer` and an
    `output_scale`. The bounds of weights are set from the weights now; `calibrate` (or `finetune`) sets those of
    inputs. What is trained is settled here: bounds and scales are parameters, and have `requires_grad=False` where no
    parameter of the layer requires a gradient. Nothing sets it back: `requires_grad_` is yours, before and after.

    Args:
        model: Any module; it is not changed.
        w_bits: Bits of the weights, 1 to 8, or None (32) for float. The default is 8.
        a_bits: Bits of the inputs, 1 to 8, or None (32) for float. The default is 8.
        policy: A `Policy`, the path of a TOML file, or a dict of the same form.
        preset: Name of a preset, such as `"paper-w1a1"`, instead of a policy.
        first: Bits of the first sites: `(w, a)`, a dict of settings, or None for float. The default is 8/8.
        last: Bits of the last sites, given as for `first`. The default is 8/8.
        exclude: Names, globs or `re:` patterns of sites to leave in float.
        include: Names, globs or `re:` patterns of the only sites to convert; replaces the policy's `include`.
        bits: Maps names or patterns to bits: a number for weight and input, `(w, a)`, or None for float. These rules
            come after all others and override them.
        rules: `Rule` objects that come after those of the policy.
        target: Name of the runtime to quantize for, such as `"tensorrt"` or `"litert"`; `docs/policies.md` lists them.
            All outputs are codes, as with `deploy="integer"`, in the form that the runtime asks for.
        example_inputs: Inputs to count the plan's multiply-accumulates with, as for `plan`; optional.
        **settings: Any other field of `Settings`.

    Returns:
        A model of the same class, device and dtype. `print(daqconvert.plan(qmodel))` shows what was done.

    Raises:
        PolicyError: If a setting, rule or width cannot be applied.
        ConversionError: If the model is quantized already, has nothing to convert, or a weight is empty, not finite,
            or constant although it must be normalized.
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
        rules=rules, target=target, example_inputs=example_inputs, **settings,
    )  # fmt: skip
    if not chosen.converted:
        raise ConversionError(
            f"{type(model).__name__}: nothing to quantize: {len(chosen)} convolutions and linears found, all left "
            "alone. Print daqconvert.plan(model, ...) for the reasons."
        )
    return apply_plan(copy_model(model), chosen)


def apply_plan(model: nn.Module, chosen: Plan) -> nn.Module:
    """Convert the sites of a model as a plan says, in place, and keep the plan with the model."""
    apply_sites(model, chosen.converted)
    sites = {site.layer_name: site for site in quantized_sites(model).values()}
    for name, leader in chosen.input_groups().items():
        sites[name].input_quantizer = sites[leader].input_quantizer
    _keep_frozen(model)
    model.register_load_state_dict_pre_hook(check_before_loading)
    model.register_load_state_dict_post_hook(note_after_loading)
    keep_plan(model, chosen)
    return model


def _keep_frozen(model: nn.Module) -> None:
    """Take the gradients from bounds and scales that only layers without a trainable parameter use."""
    sites = quantized_sites(model)
    learned = {name: _learned(site) for name, site in sites.items()}
    added = {id(p) for own in learned.values() for p in own}
    trained = {id(p) for name, site in sites.items() if _is_trained(model, name, site, added) for p in learned[name]}
    for parameter in (p for own in learned.values() for p in own):
        if id(parameter) not in trained:
            parameter.requires_grad_(False)


def _learned(site: QuantizedSite) -> list[nn.Parameter]:
    """Return the parameters that a site has added to its layer."""
    quantizers = [q for q in (site.weight_quantizer, site.input_quantizer) if q is not None]
    own = [p for quantizer in quantizers for p in quantizer.parameters()]
    return [*own, *(p for p in (site._parameters.get("output_scale"),) if p is not None)]


def _is_trained(model: nn.Module, name: str, site: QuantizedSite, added: set[int]) -> bool:
    """Whether a site's weight is trained; without one of its own, whether the module around it is."""
    if isinstance(site, CallHolder) and site.source is not None:
        with torch.inference_mode(False), torch.enable_grad():  # so that a computed weight says where it comes from
            weight = site.float_weight()
        return weight is not None and weight.requires_grad
    while True:
        found = [p for p in model.get_submodule(name).parameters() if id(p) not in added]
        if found or not name:
            return not found or any(p.requires_grad for p in found)
        name = name.rpartition(".")[0]


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
    """Return the quantized sites by dotted name; raise if there are none or the model is frozen."""
    for name, module in model.named_modules():
        if isinstance(module, FrozenSite):
            raise FrozenError(
                f"{verb}: {name or 'the model'} is frozen: it holds integer codes and no trainable weights. "
                f"Call {verb} on the quantized model it was frozen from."
            )
    sites = quantized_sites(model)
    if not sites:
        raise ConversionError(
            f"{verb}: {type(model).__name__} has no quantized layer. Call daqconvert.quantize(model, ...) first."
        )
    if plan_owners(model):
        current_plan(model, verb)  # warns of changes
    return sites


def load_float(qmodel: nn.Module, state_dict: dict[str, Tensor]) -> nn.Module:
    """Load the state dict of the float model into a quantized model, in place, and mark its bounds uncalibrated.

    Loading is strict: the state dict has to have every key of the float model and no other.

    Args:
        qmodel: A quantized model; it is changed in place.
        state_dict: The state dict of the float model that it was made from, or of one like it.

    Returns:
        The same model. `calibrate` (or `finetune`) has to set its bounds again, and the signs that data decide.

    Raises:
        ConversionError: If a key is missing or unexpected, or a tensor has another shape. Nothing is loaded then.

    Example:
        >>> import daqconvert as dq
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> qmodel = dq.load_float(dq.quantize(model, w_bits=4, a_bits=4), model.state_dict())
    """
    sites = require_quantized(qmodel, "load_float")
    everywhere = qmodel.named_modules(remove_duplicate=False)  # a layer under two names has its keys under both
    own = {f"{name}." if name else "" for name, module in everywhere if isinstance(module, QuantizedSite)}
    quantizers = {start + key for start in own for key in ("weight_quantizer", "input_quantizer", "output_scale")}
    state = qmodel.state_dict()
    current = {key: value for key, value in state.items() if not any(outer in quantizers for outer in _outer(key))}
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
        if tensor.is_meta and name not in state_dict and not any(outer in quantizers for outer in _outer(name))
    ]
    if problems:
        raise ConversionError(
            f"load_float: the state dict does not fit {type(qmodel).__name__}: {'; '.join(problems[:3])}"
            f"{f'; and {len(problems) - 3} more' if len(problems) > 3 else ''}. It must be the float model's."
        )
    qmodel.load_state_dict(state_dict, strict=False, assign=any(v.is_meta for v in current.values()))
    known = {row.name: row.signed for row in getattr(qmodel, PLAN_ATTRIBUTE, ())}
    for site in sites.values():
        site.leave_meta()
        if site.weight_quantizer is not None:
            site.weight_quantizer.mark(False)
        if site.input_quantizer is not None:
            site.input_quantizer.forget(known.get(site.layer_name, site.input_quantizer.sign))
    return qmodel


def _outer(key: str) -> Iterator[str]:
    """Yield a key of a state dict, then the dotted names of the modules that contain it, innermost first."""
    while key:
        yield key
        key = key.rpartition(".")[0]
