"""Finding the site that a product belongs to, by the parameter that the product's weight operand is computed from."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from daqconvert.macs.counter import Event
from daqconvert.spec import Plan, PlanRow


@dataclass(frozen=True)
class Places:
    """Where the sites of a model keep and use their weights.

    Attributes:
        sites: Names of all sites: dotted names of modules, or of bare parameters and buffers.
        tensors: Parameter or buffer -> site, for sites that are not the module which holds their weight.
        modules: Module -> site, for weights that depend on the model's inputs.
        products: Module -> sites that are products of activations, in the order in which the module computes them.
    """

    sites: Collection[str]
    tensors: Mapping[str, str] = field(default_factory=dict)
    modules: Mapping[str, str] = field(default_factory=dict)
    products: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def site(self, event: Event) -> str | None:
        """Return the name of the site that a product with a weight operand belongs to; None if there is no such site.

        If several sites are possible, the one in the running module is preferred.
        """
        found = [self.tensors[name] for name in event.tensors if name in self.tensors]
        found += [name for name in event.tensors if name in self.sites]  # a site that is named after its parameter
        found += [owner for owner in map(owner_of, event.tensors) if owner in self.sites]
        if not event.tensors:
            found = [self.modules[event.module]] if event.module in self.modules else []
        here = self.modules.get(event.module, event.module)
        return here if here in found else next(iter(found), None)


def owner_of(tensor: str) -> str:
    """Return the name of the module that a parameter belongs to; of a parametrization, the parametrized module.

    Example:
        >>> owner_of("a.b.weight"), owner_of("a.parametrizations.weight.original0")
        ('a.b', 'a')
    """
    parts = tensor.split(".")
    return ".".join(parts[: parts.index("parametrizations") if "parametrizations" in parts else -1])


def assign(events: list[Event], plan: Plan | None) -> list[tuple[Event, str | None]]:
    """Pair each product with the name of its site; None if it belongs to no site of the plan.

    A tensor may hold the weights of several sites, such as the packed projections of an attention block. If the site
    of a product with such a tensor is not known, its MACs are divided evenly among those sites of the tensor to which
    no other product is known to belong (among all of them if there are none).

    Args:
        events: Products with a weight operand, in order of execution.
        plan: The model's plan; if None, each product is named after the module that owns its weight.
    """
    if plan is None:
        return [(e, next(map(owner_of, e.tensors), e.module)) for e in events]
    shared = _shared_tensors(plan)
    places = _places(plan, shared)
    found = [places.site(event) for event in events]
    known = set(found)
    result: list[tuple[Event, str | None]] = []
    for event, site in zip(events, found, strict=True):
        rows = next((shared[tensor] for tensor in event.tensors if tensor in shared), [])
        rows = [row for row in rows if row.name not in known] or rows
        if site is not None or not rows:
            result.append((event, site))
            continue
        for i, row in enumerate(rows):
            share = event.macs * (i + 1) // len(rows) - event.macs * i // len(rows)
            result.append((replace(event, macs=share), row.name))
    return result


def _places(plan: Plan, shared: Collection[str]) -> Places:
    """Return the places of a plan's sites, without `shared` tensors, from which no single site follows."""
    sites = {row.name for row in plan if not row.site.is_product}
    modules = {name: name for name in sites}
    tensors: dict[str, str] = {}
    for row in plan:
        call = row.site.call
        if call is None or call.is_product:
            continue
        # the bounds and codes belong to one site, even if the weight is shared
        quantizer = f"{call.holder}.weight_quantizer"
        own = (f"{quantizer}.upper", f"{quantizer}.step", f"{call.holder}.weight_codes")
        tensors |= dict.fromkeys((*own, *(tensor for tensor in call.tensors if tensor not in shared)), row.name)
        modules[call.holder] = row.name
        if call.dynamic:
            modules |= dict.fromkeys(call.modules, row.name)
    return Places(sites, tensors, modules)


def _shared_tensors(plan: Plan) -> dict[str, list[PlanRow]]:
    """Return the tensors that hold the weights of several sites, each with the rows of these sites."""
    rows: dict[str, list[PlanRow]] = {}
    for row in plan:
        for tensor in row.site.call.tensors if row.site.call is not None else ():
            rows.setdefault(tensor, []).append(row)
    return {tensor: found for tensor, found in rows.items() if len(found) > 1}
