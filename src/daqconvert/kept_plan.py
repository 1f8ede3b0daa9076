"""The plan that is kept with a converted model, compared with the modules that are there when it is asked for.

A model may be changed after `quantize`: a layer replaced, blocks deleted, the model put into another. So a plan tells
what is there now (`reconcile`), and the verbs warn of what differs. A converted site is recognized by the name that it
was converted under, wherever it is now.
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

from torch import nn
from torch.nn.parameter import UninitializedParameter

from daqconvert.errors import ConversionError, first_few
from daqconvert.graph.call_sites import layer_extent
from daqconvert.layers.frozen_site import FrozenSite
from daqconvert.layers.registry import is_site_type
from daqconvert.layers.site import QuantizedSite
from daqconvert.spec import Plan, PlanRow, Site

PLAN_ATTRIBUTE = "_daqconvert_plan"
PLACES_ATTRIBUTE = "_daqconvert_places"
PUT_IN = "put in after quantize: it stays in float"


def current_plan(model: nn.Module, verb: str = "plan") -> Plan:
    """Return the plan of a quantized or frozen model as it is now: its sites, bits, and the signs that were decided.

    Warns if layers were replaced, put in, removed or renamed after `quantize`; `verb` begins the warning.

    Raises:
        ConversionError: If the model is not quantized, or is a part of a quantized model.
    """
    return reconcile_and_warn(model, verb).plan


def reconcile_and_warn(model: nn.Module, verb: str) -> Reconciled:
    """Return what `reconcile` does, and warn of changes."""
    found = reconcile(model, verb)
    if found.changes:
        warnings.warn(changed_text(model, found.changes, verb), stacklevel=4)
    return found


def plan_now(model: nn.Module) -> Plan | None:
    """Return the plan of a model as it is now, without a warning; None if it has none."""
    return reconcile(model).plan if plan_owners(model) else None


def changed_text(model: nn.Module, changes: tuple[str, ...], verb: str) -> str:
    """Return the message about a model that was changed after `quantize`."""
    return (
        f"{verb}: {type(model).__name__} was changed after quantize: {first_few(changes, 4)}. "
        f"{verb} takes it as it is now. To quantize what was put in: change the float model first, then call "
        "daqconvert.quantize."
    )


@dataclasses.dataclass(frozen=True)
class SitePlaces:
    """Where the sites of a model were when its plan was made.

    Attributes:
        sites: Dotted path of each converted site -> its name in the plan.
        floats: Dotted path of each layer that stays in float -> its class and the shape of its weight.
    """

    sites: dict[str, str]
    floats: dict[str, tuple[str, tuple[int, ...]]]

    @staticmethod
    def of(model: nn.Module) -> SitePlaces:
        """Return where the sites of a model are now."""
        modules = dict(model.named_modules())
        sites = {path: m.layer_name for path, m in modules.items() if isinstance(m, (QuantizedSite, FrozenSite))}
        floats = {path: _identity(m) for path, m in modules.items() if path not in sites and is_site_type(m)}
        return SitePlaces(sites, floats)


def _identity(module: nn.Module) -> tuple[str, tuple[int, ...]]:
    weight = module._parameters.get("weight")
    known = weight is not None and not isinstance(weight, UninitializedParameter)
    return type(module).__name__, tuple(weight.shape) if known and weight is not None else ()


def keep_plan(model: nn.Module, chosen: Plan) -> None:
    """Keep a plan with the model that it is true of; those of models inside are forgotten."""
    for module in model.modules():
        for attribute in (PLAN_ATTRIBUTE, PLACES_ATTRIBUTE):
            module.__dict__.pop(attribute, None)
    object.__setattr__(model, PLAN_ATTRIBUTE, chosen)
    object.__setattr__(model, PLACES_ATTRIBUTE, SitePlaces.of(model))


def plan_owners(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that keep a plan, by dotted path, inner ones first."""
    found = {path: m for path, m in model.named_modules() if isinstance(m.__dict__.get(PLAN_ATTRIBUTE), Plan)}
    return dict(sorted(found.items(), key=lambda item: -len(item[0])))


@dataclasses.dataclass(frozen=True)
class Reconciled:
    """The plan of a model as it is now.

    Attributes:
        plan: The plan.
        names: Dotted path of each converted site -> its name in the plan.
        changes: What differs from the plan that was made, in words; none if the model is only inside another.
    """

    plan: Plan
    names: dict[str, str]
    changes: tuple[str, ...]

    def require_known(self, model: nn.Module, verb: str) -> None:
        """Raise if a changed model cannot be frozen or saved.

        Raises:
            ConversionError: If the row of a site is not known, or integer deployment was planned for the old graph.
        """
        places = SitePlaces.of(model).sites
        unknown = [path or "(root)" for path in places if path not in self.names]
        rows = [(row.name, row.settings) for row in self.plan.converted]
        integer = [name for name, settings in rows if settings is not None and settings.deploy == "integer"]
        renamed = any(name != self.names.get(path) for path, name in places.items())
        if not (unknown or (integer and (self.changes or renamed))):
            return
        what = (
            f"{unknown[0]} was quantized in another model, and what it was there is not known"
            if unknown
            else f'{integer[0]} has deploy = "integer", which was planned for the model as it was'
        )
        raise ConversionError(
            f"{verb}: {type(model).__name__} was changed after quantize, or is around the quantized model "
            f"({'; '.join(self.changes[:3]) or 'its layers have other names'}): {what}. Change the float model, call "
            "daqconvert.quantize on that, and load the weights with daqconvert.load_float."
        )


def reconcile(model: nn.Module, verb: str = "plan") -> Reconciled:
    """Compare the plan that is kept with a model, or with models inside it, with the modules that are there now.

    Raises:
        ConversionError: If there is no plan.
    """
    model = model._modules.get("_orig_mod") or model  # of torch.compile
    owners = plan_owners(model)
    if not owners:
        raise ConversionError(
            f"{verb}: {type(model).__name__}: expected a model made by daqconvert.quantize, found one without a plan. "
            "If it is a part of a quantized model, pass the whole model."
        )
    modules = dict(model.named_modules())
    sites: dict[str, Any] = {p: m for p, m in modules.items() if isinstance(m, (QuantizedSite, FrozenSite))}
    rows: list[tuple[int, int, PlanRow]] = []
    names: dict[str, str] = {}
    changes: list[str] = []
    seen: set[tuple[int, str]] = set()
    written = {_written(path): module for path, module in modules.items()}
    tables = [_converted(keeper.__dict__[PLAN_ATTRIBUTE]) for keeper in owners.values()]
    for path, site in sites.items():
        found = _row_of(path, site, owners, tables, changes)
        if found is not None:
            names[path] = found[2].name
            rows.append(found)
            seen.add((found[0], site.layer_name))
    for number, (owner, keeper) in enumerate(owners.items()):
        names_here = {name for at, name in seen if at == number}
        left, told = _left(keeper, owner, written, {_written(path): site for path, site in sites.items()}, names_here)
        rows += [(number, place, row) for place, row in left]
        changes += told
    known = {row.name for *_, row in rows}
    for path, module in modules.items():
        if is_site_type(module) and path not in sites and _written(path) not in known:
            rows.append((len(owners), 0, _put_in(path, module)))
            changes += [f"{path}, a float {type(module).__name__}, was put in"] if "" in owners else []
    ordered = tuple(row for *_, row in sorted(rows, key=lambda item: item[:2]))
    outer = list(owners.values())[-1].__dict__[PLAN_ATTRIBUTE]
    plan = dataclasses.replace(outer, rows=ordered, model=outer.model if "" in owners else type(model).__name__)
    return Reconciled(plan, names, tuple(changes))


def _converted(plan: Plan) -> dict[str, tuple[int, PlanRow]]:
    """Return the rows of the converted sites and their places in a plan, by name."""
    return {row.name: (at, row) for at, row in reversed(list(enumerate(plan.rows))) if row.converted}


def _written(path: str) -> str:
    """Return a dotted path as it is written in the code: without what `torch.compile` of a part has put in."""
    return ".".join(part for part in path.split(".") if part != "_orig_mod")


def _row_of(
    path: str,
    site: Any,
    owners: dict[str, nn.Module],
    tables: list[dict[str, tuple[int, PlanRow]]],
    changes: list[str],
) -> tuple[int, int, PlanRow] | None:
    """Return a site's row as it is now, after the number of the plan that has it, and its place there.

    The plan is that of the innermost keeper; None if no plan has the site. What differs is added to `changes`.
    """
    for number, (owner, keeper) in enumerate(owners.items()):
        places, known = keeper.__dict__.get(PLACES_ATTRIBUTE), tables[number].get(site.layer_name)
        if known is None or (owner and path != owner and not path.startswith(f"{owner}.")):
            continue
        (place, row), inner = known, _inner(_written(path), _written(owner))
        old = inner
        if places is not None and places.sites.get(inner) != row.name:
            old = next((p for p, name in places.sites.items() if name == row.name), row.name)
        if old != inner or owner:
            row = _renamed(row, *_prefixes(old, _written(path)))
        if old != inner:
            changes.append(f"{_join(owner, old)} is {path} now")
        if isinstance(site, QuantizedSite) and site.input_quantizer is not None:
            row = dataclasses.replace(row, signed=site.input_quantizer.sign)
        return number, place, _as_found(row, site)
    changes.append(f"{path or '(root)'} was quantized in another model, and its row is not known")
    return None


def _as_found(row: PlanRow, site: Any) -> PlanRow:
    """Return a site's row with the settings, and the size of the weight, that the site has."""
    settings, weight = site.settings, site._buffers.get("weight_codes", site._parameters.get("weight"))
    if weight is None or row.site.call is not None or tuple(weight.shape) == row.site.weight_shape:
        return dataclasses.replace(row, settings=settings)
    facts = dataclasses.replace(float_site(row.name, site, tuple(weight.shape), ""), kind=row.site.kind)
    return dataclasses.replace(row, site=facts, settings=settings)


def _left(
    keeper: nn.Module, owner: str, modules: dict[str, nn.Module], sites: dict[str, Any], seen: set[str]
) -> tuple[list[tuple[int, PlanRow]], list[str]]:
    """Return the rows of what a plan's keeper has in float, with their places in the plan, and what has changed."""
    plan, places = keeper.__dict__[PLAN_ATTRIBUTE], keeper.__dict__.get(PLACES_ATTRIBUTE)
    rows, changes = [], []
    for place, row in enumerate(plan.rows):
        path = _join(owner, row.name)
        module = modules.get(path)
        before = None if places is None else places.floats.get(row.name)
        if row.name in seen or (row.converted and path in sites):
            continue
        is_float = module is not None and path not in sites and is_site_type(module)
        kept = before is None or (module is not None and _identity(module) == before)
        if not row.converted and kept and (before is not None or _calls_are_there(row, owner, modules)):
            rows.append((place, _renamed(row, "", owner) if owner else row))
        elif is_float and module is not None:
            rows.append((place, _put_in(path, module)))
            changes.append(f"{path or '(root)'} is a float {type(module).__name__} now")
        elif path not in sites:
            changes.append(f"{path or '(root)'} is gone")
    return rows, changes


def _calls_are_there(row: PlanRow, owner: str, modules: dict[str, nn.Module]) -> bool:
    called = [row.name] if row.site.call is None else row.site.call.modules
    return row.site.call is None or all(_join(owner, path) in modules for path in called)


def _put_in(path: str, module: nn.Module) -> PlanRow:
    return PlanRow(float_site(path, module, _identity(module)[1], PUT_IN), None, "changed after quantize", PUT_IN)


def float_site(name: str, module: nn.Module, shape: tuple[int, ...], reason: str) -> Site:
    """Return the facts of a layer with a weight of this shape that stays in float, without the model around it."""
    params = sum(p.numel() for p in module.parameters() if not isinstance(p, UninitializedParameter))
    return Site(name, type(module).__name__, shape, *layer_extent(module, shape), params, reason)


def _join(owner: str, path: str) -> str:
    return f"{owner}.{path}".strip(".")


def _inner(path: str, owner: str) -> str:
    return path.removeprefix(owner).removeprefix(".")


def _prefixes(old: str, new: str) -> tuple[str, str]:
    """Return the part of two dotted paths in which they differ: what is common at their ends is taken away."""
    before, after = (path.split(".") if path else [] for path in (old, new))
    while before and after and before[-1] == after[-1]:
        before.pop(), after.pop()
    return ".".join(before), ".".join(after)


def _renamed(row: PlanRow, old: str, new: str) -> PlanRow:
    """Return a row with `old` at the beginning of every dotted name replaced by `new`; its output is not known."""

    def moved(name: str) -> str:
        inside = not old or name == old or name.startswith(f"{old}.")
        return _join(new, name.removeprefix(old).removeprefix(".")) if inside else name

    site, call = row.site, row.site.call
    if call is not None:
        call = dataclasses.replace(
            call, modules=tuple(map(moved, call.modules)), holder=moved(call.holder),
            tensors=tuple(map(moved, call.tensors)),
        )  # fmt: skip
    reads = moved(site.reads) if site.reads else ""
    return dataclasses.replace(
        row, site=dataclasses.replace(site, name=moved(site.name), call=call, reads=reads, output=None)
    )
